"""`qpack convert --dry-run`: what it says comes true, and nothing is written."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub
import pytest
from test_cli import contents, run

import qpack
from qpack.checkpoint import Checkpoint
from qpack.errors import CheckpointError, DataError, DiskFullError, OutputExistsError
from qpack.sizes import format_size


def weight_files(directory: Path) -> list[tuple[str, int]]:
    return [(path.name, path.stat().st_size) for path in sorted(directory.glob("*.safetensors"))]


def lines(text: str) -> dict[str, str]:
    """Label and value of every line below the title."""
    return {line[:12].strip(): line[12:] for line in text.splitlines()[1:]}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_shard_size": "200KB"},
        {"double_quant": False, "blocksize": 4096},
        {"quant_storage": "bfloat16", "blocksize": 32},
    ],
    ids=str,
)
def test_what_it_says_is_what_convert_writes(settings: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "packed"
    before = contents(llama)
    dry = qpack.plan_conversion(llama, output, **settings)
    assert list(tmp_path.iterdir()) == []
    assert contents(llama) == before
    report = qpack.convert(llama, output, **settings)
    # The one thing not known before is the number of digits of the nested offset in the state's text.
    written = weight_files(output)
    assert list(dry.files) == written
    assert dry.bytes == sum(size for _, size in written)
    assert dry.source_bytes == report.source_bytes
    assert dry.plan.packed == {weight.name: weight.shape for weight in report.result.packed}
    assert dry.packed_bits >= report.result.packed_bits == pytest.approx(dry.packed_bits, abs=0.1)
    assert dry.fits_disk
    assert dry.scratch_bytes == 0
    assert dry.config == Checkpoint.open(output).config


def test_what_it_prints(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "packed"
    done = run("convert", llama, output, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    assert done.stderr == ""
    title, *_ = done.stdout.splitlines()
    assert title == f"{output} (dry run, nothing is written)"
    found = lines(done.stdout)
    assert list(found) == ["would pack", "bits", "kept", "time", "disk", "serving", "training"]
    size = format_size(qpack.plan_conversion(llama, output).bytes)
    assert found["would pack"] == f"14 weights, 2.53 MB to {size} in 1 file"
    assert re.fullmatch(r"4\.\d{3} a packed weight, \d\.\d{3} over all", found["bits"])
    assert found["kept"] == "5 x norm, 1 x input embedding"
    assert re.fullmatch(r"about 0 s, at \d\S* [MG]B/s as the source was read just now", found["time"])
    assert re.fullmatch(rf"\d\S* [MGT]B free for {size}", found["disk"])
    assert "GB" in found["serving"]
    assert "GB" in found["training"]


def test_the_time_is_that_of_reading_at_the_measured_rate(llama: Path, tmp_path: Path) -> None:
    dry = qpack.plan_conversion(llama, tmp_path / "packed")
    assert dry.read_rate is not None
    assert dry.read_rate > 1e6
    assert dry.seconds == dry.source_bytes / dry.read_rate


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mount)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_without_room_is_shown(llama: Path, small_disk: Path) -> None:
    output = small_disk / "packed"
    dry = qpack.plan_conversion(llama, output)
    assert not dry.fits_disk
    assert dry.free_bytes == 512 << 10
    shown = lines(run("convert", llama, output, "--dry-run").stdout)["disk"]
    assert shown == f"NO ROOM: 524 kB free for {format_size(dry.bytes)}"
    with pytest.raises(DiskFullError, match="its disk has 524 kB free"):
        qpack.convert(llama, output)
    assert list(small_disk.iterdir()) == []


def test_what_convert_refuses_it_refuses(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        qpack.plan_conversion(tmp_path / "nowhere", tmp_path / "packed")
    with pytest.raises(OutputExistsError, match="lies in the input"):
        qpack.plan_conversion(llama, llama / "packed")
    with pytest.raises(OutputExistsError, match="is or holds the input"):
        qpack.plan_conversion(llama, llama.parent)
    with pytest.raises(ValueError, match="blocksize is 48, expected one of 32, "):
        qpack.plan_conversion(llama, tmp_path / "packed", blocksize=48)
    (tmp_path / "rules.toml").write_text('[[rule]]\nmatch = "nothing"\nkeep = true\n')
    with pytest.raises(DataError, match="matches no tensor"):
        qpack.plan_conversion(llama, tmp_path / "packed", rules=tmp_path / "rules.toml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rules.toml"]


def test_a_model_of_the_hub_is_planned_from_headers(llama: Path, tmp_path: Path) -> None:
    """Whether or not it is to be fetched a shard at a time: no weights are downloaded."""
    largest = max(path.stat().st_size for path in llama.glob("*.safetensors"))
    size = format_size(qpack.plan_conversion(llama, tmp_path / "packed").bytes)
    with hub.serve(tiny=llama) as served:
        environment = {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        for options, meanwhile in (((), ""), (("--low-disk",), f" and {format_size(largest)} of shards meanwhile")):
            done = run("convert", "org/tiny", tmp_path / "packed", "--dry-run", *options, environment=environment)
            found = lines(done.stdout)
            assert found["would pack"] == f"14 weights, 2.53 MB to {size} in 1 file"
            assert found["disk"].endswith(f" free for {size}{meanwhile}")
            assert "time" not in found
        for shard in llama.glob("*.safetensors"):
            assert served.ranges(shard.name) == ["bytes=0-99999"] * 2
    assert os.listdir(tmp_path) == ["home"]
    assert not list((tmp_path / "home").rglob("*.safetensors"))
