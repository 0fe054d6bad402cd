"""`qpack convert` from every kind of source: the same model gives the same bytes, wherever it comes from."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import contents, run

import qpack
from qpack.errors import OutputExistsError
from qpack.manifest import Manifest

INDEX = "model.safetensors.index.json"


def without_source(directory: Path) -> dict[str, object]:
    """All files, but for what qpack.json says of where the model came from."""
    files: dict[str, object] = dict(contents(directory))
    manifest = json.loads((directory / "qpack.json").read_text())
    del manifest["source"]
    return files | {"qpack.json": manifest}


# ---- local paths ---------------------------------------------------------------------------------------------------


def test_an_index_or_a_single_file_is_as_good_as_its_directory(llama: Path, packed: Path, tmp_path: Path) -> None:
    run("convert", llama / INDEX, tmp_path / "from-index")
    assert without_source(tmp_path / "from-index") == without_source(packed)
    assert Manifest.read(tmp_path / "from-index").source["digest"] == Manifest.read(packed).source["digest"]

    single = shutil.copytree(llama, tmp_path / "single", ignore=shutil.ignore_patterns("model*"))
    weights = {name: tensor for file in sorted(llama.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    save_file(weights, single / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(single / "model.safetensors", single / "renamed.safetensors")
    qpack.convert(single, tmp_path / "from-single")
    for file in ("model.safetensors", "renamed.safetensors"):
        run("convert", single / file, tmp_path / f"from-{file}")
        assert without_source(tmp_path / f"from-{file}") == without_source(tmp_path / "from-single")
    assert Manifest.read(tmp_path / "from-single").fingerprint == Manifest.read(packed).fingerprint


def test_pickles_give_the_same_bytes_when_they_are_allowed(llama: Path, packed: Path, tmp_path: Path) -> None:
    source = shutil.copytree(llama, tmp_path / "source", ignore=shutil.ignore_patterns("model*"))
    weights = {name: tensor for file in sorted(llama.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    torch.save(weights, source / "pytorch_model.bin")
    done = run("convert", source, tmp_path / "packed", status=1)
    assert done.stderr.startswith(f"error: {source}/pytorch_model.bin: pickled weights can run code when loaded")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    run("convert", source, tmp_path / "packed", "--allow-pickle")
    assert Manifest.read(tmp_path / "packed").fingerprint == Manifest.read(packed).fingerprint
    names = contents(packed).keys()
    assert contents(tmp_path / "packed").keys() == names
    # Tensors come in the order of the pickle, so headers may differ; everything else does not.
    mine, theirs = without_source(tmp_path / "packed"), without_source(packed)
    for name in names - {"qpack.json", "model.safetensors"}:
        assert mine[name] == theirs[name]
    ours, other = (load_file(directory / "model.safetensors") for directory in (tmp_path / "packed", packed))
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[name], other[name]) for name in ours)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "source"]
    assert sorted(path.name for path in source.iterdir()) == sorted(
        ["pytorch_model.bin", *(path.name for path in llama.iterdir() if not path.name.startswith("model"))]
    )


def test_an_output_in_the_source_is_refused(llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(llama, tmp_path / "source")
    before = contents(source)
    link = tmp_path / "link"
    link.symlink_to(source)
    for named in (source, source / INDEX, source / "model-00001-of-00003.safetensors", link):
        for output in (source / "packed", link / "deeper" / "packed"):
            with pytest.raises(OutputExistsError, match="lies in the input"):
                qpack.convert(named, output)
    assert contents(source) == before


# ---- the hub -------------------------------------------------------------------------------------------------------


def environment(served: hub.Hub, tmp_path: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}


def test_a_model_of_the_hub(llama: Path, packed: Path, tmp_path: Path) -> None:
    with hub.serve(tiny=llama) as served:
        run("convert", "org/tiny", tmp_path / "packed", "--revision", "main", environment=environment(served, tmp_path))
    assert without_source(tmp_path / "packed") == without_source(packed)
    source, local = Manifest.read(tmp_path / "packed").source, Manifest.read(packed).source
    assert source == dict(local) | {"name": "org/tiny", "revision": hub.COMMIT}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "packed"]


def test_with_low_disk_one_shard_is_here_at_a_time(llama: Path, packed: Path, tmp_path: Path) -> None:
    shards = sorted(path.name for path in llama.glob("*.safetensors"))
    scratch = tmp_path / ".packed.partial" / ".scratch" / "shards" / hub.COMMIT
    seen: list[tuple[str, list[str]]] = []

    def look(file: str) -> None:
        if file in shards:
            seen.append((file, sorted(path.name for path in scratch.glob("*") if path.suffix == ".safetensors")))

    with hub.serve(tiny=llama) as served:
        served.on_request = look
        run("convert", "org/tiny", tmp_path / "packed", "--low-disk", environment=environment(served, tmp_path))
    fetched = seen[len(shards) :]  # after the headers
    # None of the others is here when one is asked for.
    assert fetched == [(shard, []) for shard in shards]
    assert without_source(tmp_path / "packed") == without_source(packed)
    assert Manifest.read(tmp_path / "packed").source["revision"] == hub.COMMIT
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "packed"]


def test_killed_with_low_disk_it_goes_on_and_fetches_no_shard_twice(llama: Path, packed: Path, tmp_path: Path) -> None:
    first, second, third = sorted(path.name for path in llama.glob("*.safetensors"))
    command = [sys.executable, "-m", "qpack", "convert", "org/tiny", str(tmp_path / "packed"), "--low-disk"]
    with hub.serve(tiny=llama) as served:
        variables = os.environ | environment(served, tmp_path)
        # Half of the third shard arrives; the connection breaks, and when the rest is asked for the process dies.
        size = (llama / third).stat().st_size
        killed: list[int] = []

        def kill(file: str) -> None:
            if file == third and served.ranges(third)[-1] == f"bytes=0-{size - 1}":
                served.cuts[third] = size // 2
            if file == third and served.ranges(third)[-1] == f"bytes={size // 2}-{size - 1}":
                os.kill(killed[0], signal.SIGKILL)

        served.on_request = kill
        with subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            killed.append(process.pid)
            assert process.wait(timeout=60) == -signal.SIGKILL
        assert not (tmp_path / "packed").exists()
        served.on_request = None
        before = {shard: len(served.ranges(shard)) for shard in (first, second, third)}
        subprocess.run(command, env=variables, check=True, capture_output=True)
        # Headers are read anew; of the third shard, only what had not come, but for what the kill took from a buffer.
        header = "bytes=0-99999"
        assert served.ranges(first)[before[first] :] == [header]
        again, rest = served.ranges(third)[before[third] :]
        assert again == header
        start, end = map(int, rest.removeprefix("bytes=").split("-"))
        assert size // 2 - 8192 <= start <= size // 2
        assert end == size - 1
    assert without_source(tmp_path / "packed") == without_source(packed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "packed"]
