"""What is left when `qpack convert` is stopped: never a checkpoint that loads, always one to go on with."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import qpack
from qpack.errors import CheckpointError, DiskFullError, OutputExistsError

KILLS = 50


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write_weights(directory: Path, layers: int, size: int) -> Path:
    """A Llama's config, and its layers' up_proj alone, ``size`` by ``size``, each layer in a file of its own."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers}))
    placed: dict[str, str] = {}
    for layer in range(layers):
        name, file = f"model.layers.{layer}.mlp.up_proj.weight", f"model-{layer}.safetensors"
        weight = torch.randn(size, size, generator=torch.Generator().manual_seed(layer)).to(torch.bfloat16)
        save_file({name: weight, f"kept.{layer}": weight[0].clone()}, directory / file)
        placed |= {name: file, f"kept.{layer}": file}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred megabytes in 24 files: half a second's work that can be stopped at many places."""
    return write_weights(tmp_path_factory.mktemp("models") / "source", layers=24, size=1448)


def command(source: Path, output: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "qpack", "convert", str(source), str(output), "--max-shard-size", "2MB", *options]


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(source: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    subprocess.run(command(source, tmp_path / "whole"), check=True, capture_output=True)
    seconds = time.monotonic() - begin
    expected = contents(tmp_path / "whole")

    moments = random.Random(0)
    output, journal = tmp_path / "packed", tmp_path / ".packed.partial" / ".journal"
    kills = within = 0
    while kills < KILLS:
        with subprocess.Popen(command(source, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(moments.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
        if process.returncode == -signal.SIGKILL:
            kills += 1
        if output.exists():  # it was faster than the kill, or killed while it cleared up
            assert contents(output) == expected
            for path in output.iterdir():
                path.unlink()
            output.rmdir()
        elif journal.exists():
            within += journal.read_bytes().count(b"\n") > 1
    # Many kills came in the midst of it: some tensors were finished and others not.
    assert within >= KILLS / 5
    subprocess.run(command(source, output), check=True, capture_output=True)
    assert contents(output) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "whole"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_what_is_finished_is_not_done_again(sent: signal.Signals, source: Path, tmp_path: Path) -> None:
    whole = qpack.convert(source, tmp_path / "whole", max_shard_size="2MB")
    assert whole.resumed_bytes == 0
    output = tmp_path / "packed"
    journal = tmp_path / ".packed.partial" / ".journal"
    with subprocess.Popen(command(source, output, "--threads", "1"), stderr=subprocess.PIPE, text=True) as process:
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 12):
            assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(OutputExistsError, match="another process is writing it"):
            qpack.convert(source, output)
        process.send_signal(sent)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    assert not output.exists()
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on from there" in errors
        assert errors.endswith("interrupted\n")
    report = qpack.convert(source, output, max_shard_size="2MB")
    assert report.source_bytes >= report.resumed_bytes >= 3 * 1448 * 1448 * 2
    assert contents(output) == contents(tmp_path / "whole")
    assert report.result.packed == whole.result.packed


def interrupt(source: Path, output: Path) -> None:
    """Stop a run of `qpack.convert` in the midst of it."""

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        qpack.convert(source, output, max_shard_size="2MB", threads=1, on_progress=stop)
    assert (output.parent / f".{output.name}.partial" / ".journal").exists()


def test_other_options_or_another_source_begin_anew(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "packed"
    interrupt(source, output)
    assert qpack.convert(source, output, max_shard_size="2MB", blocksize=128).resumed_bytes == 0
    changed = tmp_path / "changed"
    write_weights(changed, layers=24, size=1448)
    interrupt(changed, tmp_path / "other")
    os.utime(changed / "model-3.safetensors", (1, 1))
    assert qpack.convert(changed, tmp_path / "other", max_shard_size="2MB").resumed_bytes == 0


def test_bad_input_in_the_midst_leaves_nothing_behind(tmp_path: Path) -> None:
    source = write_weights(tmp_path / "source", layers=3, size=256)
    weight = torch.zeros(256, 256, dtype=torch.bfloat16)
    weight[7, 8] = float("inf")
    save_file(
        {"model.layers.2.mlp.up_proj.weight": weight, "kept.2": weight[0].clone()}, source / "model-2.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight is not finite at flat index 1800"
    ):
        qpack.convert(source, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(mount)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_without_room_is_refused_before_the_first_byte(source: Path, small_disk: Path) -> None:
    with pytest.raises(DiskFullError, match=r"packed: needs 26\.\d MB, its disk has 21 MB free"):
        qpack.convert(source, small_disk / "packed")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_gone_on_with(source: Path, small_disk: Path, tmp_path: Path) -> None:
    half = write_weights(tmp_path / "half", layers=12, size=1448)
    output = small_disk / "packed"
    ballast = small_disk / "ballast"

    with subprocess.Popen(command(half, output, "--threads", "1"), stderr=subprocess.PIPE, text=True) as process:
        journal = small_disk / ".packed.partial" / ".journal"
        while not journal.exists():
            assert process.poll() is None
        # The check before the first byte has passed; what fills the disk comes after it.
        process.send_signal(signal.SIGSTOP)
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "No space left on device" in errors
    assert not output.exists()
    with pytest.raises(DiskFullError, match="needs"):  # and it still is: what was finished stays
        qpack.convert(half, output, max_shard_size="2MB")
    assert journal.exists()
    ballast.unlink()
    report = qpack.convert(half, output, max_shard_size="2MB")
    assert report.result.bytes > 13_000_000
