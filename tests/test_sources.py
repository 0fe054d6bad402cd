"""`qpack.sources`: local paths, links, pickles, and the real hub client against a small hub on this machine."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from qpack.checkpoint import Checkpoint
from qpack.companions import copy_companions
from qpack.errors import CheckpointError
from qpack.sources import ShardFetcher, open_source

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in checkpoint.shards for name, tensor in load_file(shard).items()}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


# ---- local paths ---------------------------------------------------------------------------------------------------


def test_a_directory_its_index_and_one_of_its_files(llama: Path, tmp_path: Path) -> None:
    whole = open_source(llama, work=tmp_path)
    assert (whole.name, whole.revision, whole.companions) == (str(llama), None, llama)
    indexed = open_source(llama / INDEX, work=tmp_path)
    assert (indexed.checkpoint.shards, indexed.companions) == (whole.checkpoint.shards, llama)
    assert list(indexed.checkpoint.tensors) == list(whole.checkpoint.tensors) == list(Checkpoint.open(llama).tensors)

    one = open_source(llama / SHARDS[1], work=tmp_path).checkpoint
    assert one.shards == (llama / SHARDS[1],)
    assert one.config == whole.checkpoint.config
    assert set(one.tensors) == set(load_file(llama / SHARDS[1]))
    assert 0 < len(one.tensors) < len(whole.checkpoint.tensors)

    shard = whole.checkpoint.shards[0]
    assert whole.fetch(shard) == shard
    whole.drop(shard)
    assert shard.is_file()
    assert whole.peak_bytes([frozenset([shard])]) == 0
    assert list(tmp_path.iterdir()) == []


def test_paths_that_are_no_source(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / SHARDS[0], tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        open_source(tmp_path / SHARDS[0], work=tmp_path)
    with pytest.raises(CheckpointError, match=r"README\.md: not a directory"):
        (tmp_path / "README.md").touch()
        open_source(tmp_path / "README.md", work=tmp_path)
    for missing in (
        "nowhere/at/all",
        "./nowhere",
        "model.safetensors",
        "org/pytorch_model.bin",
        "org/x.index.json",
        "",
    ):
        with pytest.raises(CheckpointError, match=r"no such file or directory, and not the id|no model\.safetensors"):
            open_source(missing, work=tmp_path)
    with pytest.raises(CheckpointError, match="is a local path; revision is for models of the hub"):
        open_source(llama, work=tmp_path, revision="main")
    with pytest.raises(CheckpointError, match="is a local path; low disk is for models of the hub"):
        open_source(llama, work=tmp_path, low_disk=True)


def test_the_index_keeps_to_its_directory(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "model")
    shutil.copy(llama / SHARDS[0], tmp_path / "other.safetensors")
    index = json.loads((copy / INDEX).read_text())
    for file in ("../other.safetensors", str(tmp_path / "other.safetensors"), "..", "a\\b", "a/b", ""):
        index["weight_map"]["model.norm.weight"] = file
        (copy / "other.index.json").write_text(json.dumps(index))
        placed = re.escape(
            f"other.index.json: places tensor model.norm.weight in {json.dumps(file)}, which is not a file"
        )
        with pytest.raises(CheckpointError, match=placed):
            open_source(copy / "other.index.json", work=tmp_path)


# ---- symbolic links ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("name", [SHARDS[1], INDEX, "config.json", "tokenizer.json"])
def test_links_that_leave_the_directory_are_refused(name: str, relative: bool, llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "model")
    (copy / name).rename(tmp_path / "outside")
    (copy / name).symlink_to(Path("../outside") if relative else tmp_path / "outside")
    with pytest.raises(CheckpointError, match=rf"model/{name}: is a symbolic link to .*/outside, outside the model's"):
        open_source(copy, work=tmp_path)
    if name == "tokenizer.json":
        (tmp_path / "packed").mkdir()
        with pytest.raises(CheckpointError, match="is a symbolic link"):
            copy_companions(copy, tmp_path / "packed")
        assert list((tmp_path / "packed").iterdir()) == []
    else:
        with pytest.raises(CheckpointError, match="is a symbolic link"):
            Checkpoint.open(copy)
    if name == SHARDS[1]:
        with pytest.raises(CheckpointError, match="is a symbolic link"):
            open_source(copy / name, work=tmp_path)


def test_links_within_the_directory_and_to_it_are_followed(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "model")
    (copy / SHARDS[0]).rename(copy / "weights")
    (copy / SHARDS[0]).symlink_to("weights")
    (tmp_path / "link").symlink_to(copy)
    assert_same_tensors(
        tensors(open_source(tmp_path / "link", work=tmp_path).checkpoint), tensors(Checkpoint.open(llama))
    )


def cache(llama: Path, root: Path) -> Path:
    """``llama`` as a Hugging Face cache holds it; its snapshot is returned."""
    snapshot = root / "models--org--tiny" / "snapshots" / hub.COMMIT
    blobs = root / "models--org--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in llama.iterdir():
        shutil.copy(path, blobs / hub.etag(path))
        (snapshot / path.name).symlink_to(f"../../blobs/{hub.etag(path)}")
    return snapshot


def test_a_snapshot_of_a_cache_links_to_its_own_blobs_only(llama: Path, tmp_path: Path) -> None:
    snapshot = cache(llama, tmp_path)
    assert_same_tensors(tensors(open_source(snapshot, work=tmp_path).checkpoint), tensors(Checkpoint.open(llama)))
    other = cache(llama, tmp_path / "other")
    for target in (other / SHARDS[1], tmp_path / "models--org--tiny" / "config.json"):
        (snapshot / SHARDS[1]).unlink()
        (snapshot / SHARDS[1]).symlink_to(target)
        with pytest.raises(CheckpointError, match="is a symbolic link to"):
            open_source(snapshot, work=tmp_path)


# ---- pickles -------------------------------------------------------------------------------------------------------


def pickled(llama: Path, directory: Path, *, shards: int = 2) -> dict[str, torch.Tensor]:
    """``llama`` as torch.save writes it, tied as a model in memory is, and the tensors that it holds."""
    shutil.copytree(llama, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = tensors(Checkpoint.open(llama))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # one storage, two names
    state["model.norm.weight"] = torch.arange(512).bfloat16()[::2]  # not contiguous
    state["step"] = torch.tensor(7)
    names = list(state)
    files = [f"pytorch_model-{number:05}-of-{shards:05}.bin" for number in range(1, shards + 1)]
    placed = {name: files[position * shards // len(names)] for position, name in enumerate(names)}
    placed["lm_head.weight"] = placed["model.embed_tokens.weight"]
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return state
    for file in files:
        torch.save({name: state[name] for name in names if placed[name] == file}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    return state


@pytest.mark.parametrize("shards", [1, 2])
def test_pickles_are_refused_by_name_or_rewritten(shards: int, llama: Path, tmp_path: Path) -> None:
    state = pickled(llama, tmp_path / "model", shards=shards)
    (tmp_path / "model" / "training_args.bin").write_bytes(b"no weights")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin.*: pickled weights can run code when loaded \(--allow"
    ):
        open_source(tmp_path / "model", work=tmp_path / "work")
    assert not (tmp_path / "work").exists()

    source = open_source(tmp_path / "model", work=tmp_path / "work", allow_pickle=True)
    assert len(source.checkpoint.shards) == shards
    assert_same_tensors(tensors(source.checkpoint), state)
    assert source.companions == tmp_path / "model"
    assert source.directories == (source.checkpoint.directory, tmp_path / "model")
    first = {path.name: path.read_bytes() for path in source.checkpoint.directory.iterdir()}
    open_source(tmp_path / "model", work=tmp_path / "work", allow_pickle=True)
    assert first == {path.name: path.read_bytes() for path in source.checkpoint.directory.iterdir()}


def test_one_pickle_of_many_and_old_ones(llama: Path, tmp_path: Path) -> None:
    pickled(llama, tmp_path / "model")
    file = tmp_path / "model" / "pytorch_model-00002-of-00002.bin"
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin: pickled weights"):
        open_source(file, work=tmp_path / "work")
    expected = torch.load(file)
    found = open_source(file, work=tmp_path / "work", allow_pickle=True).checkpoint
    assert_same_tensors(tensors(found), expected)
    torch.save(expected, tmp_path / "model" / "old.pt", _use_new_zipfile_serialization=False)
    found = open_source(tmp_path / "model" / "old.pt", work=tmp_path / "work", allow_pickle=True).checkpoint
    assert_same_tensors(tensors(found), expected)


class Attack:
    """What a pickle can do: here it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickles_that_run_code_are_refused_unrun(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    file = tmp_path / "model" / "pytorch_model.bin"
    attack = {"weight": torch.zeros(1), "attack": Attack(tmp_path / "ran")}
    torch.save(attack, file)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"refused: holds something else than tensors \(") as caught:
            open_source(tmp_path / "model", work=tmp_path / "work", allow_pickle=True)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "ran").exists()
        file.write_bytes(pickle.dumps(attack))  # and without torch's container
    pickle.loads(file.read_bytes())
    assert (tmp_path / "ran").exists(), "the attack works"


BAD_PICKLES = {
    "nothing": (b"", "not a file of pickled tensors"),
    "junk": (b"junkjunk", "not a file of pickled tensors"),
    "a list": ([torch.zeros(1)], "holds list, expected tensors by name"),
    "nested": ({"state_dict": {"weight": torch.zeros(1)}}, "'state_dict' is dict, expected tensors by name"),
    "complex": ({"weight": torch.zeros(1, dtype=torch.complex64)}, r"tensor weight: torch\.complex64"),
    "sparse": ({"weight": torch.eye(2).to_sparse()}, r"tensor weight: torch\.float32, torch\.sparse_coo"),
}


@pytest.mark.parametrize(("content", "message"), BAD_PICKLES.values(), ids=BAD_PICKLES)
def test_pickles_of_something_else_are_refused(content: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: .*{message}"):
        open_source(tmp_path, work=tmp_path / "work", allow_pickle=True)


def test_pickles_that_do_not_belong_together_are_refused(llama: Path, tmp_path: Path) -> None:
    pickled(llama, tmp_path / "model")
    (tmp_path / "model" / "pytorch_model-00002-of-00002.bin").rename(tmp_path / "moved")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model-00002-of-00002\.bin: no such file, but pytorch_model\.bin\.in"
    ):
        open_source(tmp_path / "model", work=tmp_path / "work", allow_pickle=True)
    (tmp_path / "model" / "pytorch_model-00002-of-00002.bin").symlink_to("../moved")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        open_source(tmp_path / "model", work=tmp_path / "work", allow_pickle=True)
    (tmp_path / "model" / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds 2 pickled files and no pytorch_model\.bin\.index\.json"):
        open_source(tmp_path / "model", work=tmp_path / "work", allow_pickle=True)
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        open_source(tmp_path / "model", work=tmp_path / "work", allow_pickle=True)


# ---- the hub -------------------------------------------------------------------------------------------------------

# The client reads its environment once, so every case is a process of its own.
PROGRAM = """
import json, os, sys
from pathlib import Path
from qpack.errors import CheckpointError
from qpack.sources import open_source
name, options, fetch = json.loads(sys.argv[1])
def here():
    return sorted(path.name for path in Path("work").rglob("*.safetensors*") if path.parent.name != "headers")
try:
    source = open_source(name, work=Path("work"), **options)
    checkpoint = source.checkpoint
    taken = sum(path.stat().st_blocks * 512 for path in checkpoint.shards)
    steps = []
    for shard in checkpoint.shards if fetch else ():
        path = source.fetch(shard)
        steps.append([str(path.resolve()), path.read_bytes().hex()[:64], path.stat().st_size, here()])
        source.drop(shard)
    sizes = [frozenset([shard]) for shard in checkpoint.shards]
    print(json.dumps({
        "name": source.name, "revision": source.revision, "companions": str(source.companions),
        "directory": str(checkpoint.directory), "shards": [path.name for path in checkpoint.shards],
        "tensors": {name: [info.dtype, info.shape] for name, info in checkpoint.tensors.items()},
        "taken": taken, "steps": steps, "left": here(), "peak": source.peak_bytes(sizes),
        "peak of all": source.peak_bytes([frozenset(checkpoint.shards)]),
    }))
except CheckpointError as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture
def tiny(llama: Path, tmp_path: Path) -> Iterator[hub.Hub]:
    """A hub with ``org/tiny``, which holds more than what is wanted of it."""
    model = shutil.copytree(llama, tmp_path / "served")
    (model / "LICENSE").write_text("do as you like")
    (model / "consolidated.safetensors").write_bytes(b"the same weights once more")
    (model / "model.gguf").write_bytes(b"and again")
    (model / "onnx").mkdir()
    (model / "onnx" / "config.json").write_text("{}")
    with hub.serve(tiny=model) as served:
        yield served


def run(
    served: hub.Hub,
    tmp_path: Path,
    name: str = "org/tiny",
    *,
    fetch: bool = False,
    environment: dict[str, str] | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([name, options, fetch])],
        env=clean | settings | (environment or {}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


def opened(served: hub.Hub, tmp_path: Path, **options: Any) -> dict[str, Any]:
    done = run(served, tmp_path, **options)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(served: hub.Hub, tmp_path: Path, **options: Any) -> str:
    done = run(served, tmp_path, **options)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    return line


def test_a_model_of_the_hub(tiny: hub.Hub, llama: Path, tmp_path: Path) -> None:
    found = opened(tiny, tmp_path)
    assert (found["name"], found["revision"], found["shards"]) == ("org/tiny", hub.COMMIT, SHARDS)
    checkpoint = Checkpoint.open(Path(found["directory"]))
    assert_same_tensors(tensors(checkpoint), tensors(Checkpoint.open(llama)))
    names = {path.name for path in Path(found["companions"]).iterdir()}
    assert names == {path.name for path in llama.iterdir()} | {"LICENSE"}
    # A second time nothing but the revision is looked up, and with the cache alone not even that.
    before = len(tiny.requests)
    assert opened(tiny, tmp_path) == found
    asked = [path for _, path, _ in tiny.requests[before:] if "org/tiny" in path]
    assert asked == ["/api/models/org/tiny/revision/main"]
    before = len(tiny.requests)
    assert opened(tiny, tmp_path, environment={"HF_HUB_OFFLINE": "1"}) == found
    assert opened(tiny, tmp_path, revision=hub.COMMIT, low_disk=True, environment={"HF_HUB_OFFLINE": "1"}) == found
    shutil.rmtree(tmp_path / "home" / "hub" / "models--org--tiny" / "trees")  # as older clients leave it
    assert opened(tiny, tmp_path, environment={"HF_HUB_OFFLINE": "1"}) == found
    assert len(tiny.requests) == before


def test_a_local_path_wins(tiny: hub.Hub, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "org" / "tiny")
    assert opened(tiny, tmp_path)["directory"] == "org/tiny"
    assert tiny.requests == []


def test_a_download_that_is_cut_goes_on_where_it_broke(tiny: hub.Hub, tmp_path: Path) -> None:
    served = tiny.models["org/tiny"]
    for path in served.glob("model*"):
        path.unlink()
    weights = {"model.norm.weight": torch.randn(6_000_000)}
    save_file(weights, served / "model.safetensors")
    tiny.cuts["model.safetensors"] = 12_000_000
    found = opened(tiny, tmp_path)
    # The client writes 10 MiB at a time.
    assert tiny.ranges("model.safetensors") == ["", f"bytes={10 * 2**20}-"]
    assert_same_tensors(tensors(Checkpoint.open(Path(found["directory"]))), weights)


def test_refusals_of_the_hub_are_one_line(tiny: hub.Hub, tmp_path: Path) -> None:
    line = refused(tiny, tmp_path, name="org/other")
    assert line == f"error: org/other: no such path, and no such model on {tiny.url}, or a private one (set HF_TOKEN)"
    line = refused(tiny, tmp_path, revision="v2")
    assert line == f"error: org/tiny: no revision v2 on {tiny.url}"
    line = refused(tiny, tmp_path, environment={"HF_HUB_OFFLINE": "1"})
    assert line == "error: org/tiny: no such path, not in the cache of the hub, and HF_HUB_OFFLINE is set"
    line = refused(tiny, tmp_path, environment={"HF_ENDPOINT": "http://127.0.0.1:1"})
    assert (
        line == "error: org/tiny: no such path, not in the cache of the hub, and http://127.0.0.1:1 cannot be reached"
    )
    line = refused(tiny, tmp_path, name="a--b")
    assert line.startswith("error: a--b: no such path, and not a hub id: ")
    tiny.token, tiny.gated = "secret", True
    assert (
        refused(tiny, tmp_path) == f"error: org/tiny: gated; accept its terms at {tiny.url}/org/tiny and set HF_TOKEN"
    )
    token = {"HF_TOKEN": "secret"}
    assert len(opened(tiny, tmp_path, low_disk=True, fetch=True, environment=token)["steps"]) == len(SHARDS)
    assert opened(tiny, tmp_path, environment=token)["revision"] == hub.COMMIT


def test_models_of_the_hub_without_safetensors(tiny: hub.Hub, llama: Path, tmp_path: Path) -> None:
    served = tiny.models["org/tiny"]
    shutil.rmtree(served)
    state = pickled(llama, served)
    name = "pytorch_model-00001-of-00002.bin"
    assert refused(tiny, tmp_path).startswith(f"error: org/tiny: {name}: pickled weights can run code when loaded")
    assert tiny.ranges(name) == []
    assert refused(tiny, tmp_path, allow_pickle=True, low_disk=True).startswith(
        f"error: org/tiny: {name}: pickled weights"
    )
    found = opened(tiny, tmp_path, allow_pickle=True)
    assert found["directory"] == "work/unpickled"
    assert_same_tensors(tensors(Checkpoint.open(tmp_path / "work" / "unpickled")), state)

    shutil.rmtree(tmp_path / "home")
    for path in served.glob("pytorch_model*"):
        path.unlink()
    line = refused(tiny, tmp_path)
    assert line == f"error: org/tiny: no {INDEX} and no model.safetensors at {hub.COMMIT}"


def test_an_index_of_the_hub_that_names_what_is_not_there(tiny: hub.Hub, tmp_path: Path) -> None:
    (tiny.models["org/tiny"] / SHARDS[1]).unlink()
    assert f"{SHARDS[1]}: no such file, but {INDEX} names it" in refused(tiny, tmp_path)
    line = refused(tiny, tmp_path, low_disk=True)
    assert line == f"error: org/tiny: no file {SHARDS[1]} at {hub.COMMIT}, but {INDEX} names it"


# ---- the hub, one shard at a time ----------------------------------------------------------------------------------


def test_low_disk_plans_from_headers_and_holds_one_shard(tiny: hub.Hub, llama: Path, tmp_path: Path) -> None:
    planned = opened(tiny, tmp_path, low_disk=True)
    expected = Checkpoint.open(llama)
    assert planned["tensors"] == {name: [info.dtype, list(info.shape)] for name, info in expected.tensors.items()}
    assert planned["taken"] <= 3 * 4096  # the headers
    assert (planned["shards"], planned["left"]) == (SHARDS, [])
    assert [tiny.ranges(shard) for shard in SHARDS] == [["bytes=0-99999"]] * 3
    sizes = [(llama / shard).stat().st_size for shard in SHARDS]
    assert (planned["peak"], planned["peak of all"]) == (max(sizes), sum(sizes))

    found = opened(tiny, tmp_path, low_disk=True, fetch=True)
    for shard, size, (path, start, length, here) in zip(SHARDS, sizes, found["steps"], strict=True):
        assert (Path(path).name, here, length) == (shard, [shard], size)
        assert start == (llama / shard).read_bytes()[:32].hex()
        assert tiny.ranges(shard)[-1] == f"bytes=0-{size - 1}"
    assert found["left"] == []
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_low_disk_takes_what_the_cache_has_and_leaves_it_there(tiny: hub.Hub, llama: Path, tmp_path: Path) -> None:
    snapshot = Path(opened(tiny, tmp_path)["directory"])
    (snapshot / SHARDS[2]).unlink()
    before = len(tiny.ranges(SHARDS[0]))
    found = opened(tiny, tmp_path, low_disk=True, fetch=True)
    assert [here for _, _, _, here in found["steps"]] == [[], [], [SHARDS[2]]]
    assert found["peak of all"] == (llama / SHARDS[2]).stat().st_size
    assert (snapshot / SHARDS[0]).is_file()
    assert tiny.ranges(SHARDS[0])[before:] == ["bytes=0-99999"]


def test_a_shard_that_is_cut_goes_on_where_it_broke(tiny: hub.Hub, llama: Path, tmp_path: Path) -> None:
    opened(tiny, tmp_path, low_disk=True)
    size = (llama / SHARDS[1]).stat().st_size
    tiny.cuts[SHARDS[1]] = 200_000
    found = opened(tiny, tmp_path, low_disk=True, fetch=True)
    assert found["steps"][1][2] == size
    assert tiny.ranges(SHARDS[1])[-2:] == [f"bytes=0-{size - 1}", f"bytes=200000-{size - 1}"]


def test_a_killed_run_s_shard_goes_on_where_it_ended(tiny: hub.Hub, llama: Path, tmp_path: Path) -> None:
    size = (llama / SHARDS[0]).stat().st_size
    partial = tmp_path / "work" / "shards" / hub.COMMIT / f"{SHARDS[0]}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes((llama / SHARDS[0]).read_bytes()[:300_000])
    found = opened(tiny, tmp_path, low_disk=True, fetch=True)
    assert found["steps"][0][2] == size
    assert tiny.ranges(SHARDS[0])[-1] == f"bytes=300000-{size - 1}"


def test_shards_that_are_not_what_the_hub_lists_are_refused(tiny: hub.Hub, tmp_path: Path) -> None:
    tiny.corrupt.add(SHARDS[0])
    line = refused(tiny, tmp_path, low_disk=True, fetch=True)
    assert line.startswith(f"error: org/tiny: {SHARDS[0]}: SHA-256 is ")
    assert not list((tmp_path / "work" / "shards").rglob("*.safetensors*"))


def test_headers_of_the_hub_are_checked_as_any(tiny: hub.Hub, tmp_path: Path) -> None:
    path = tiny.models["org/tiny"] / SHARDS[0]
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    assert f"{SHARDS[0]}: header length 18446744073709551615 is over" in refused(tiny, tmp_path, low_disk=True)


def test_a_header_longer_than_the_first_request(tiny: hub.Hub, tmp_path: Path) -> None:
    served = tiny.models["org/tiny"]
    for path in served.glob("model*"):
        path.unlink()
    many = {f"model.layers.{layer}.some_tensor_with_a_long_name": torch.zeros(1) for layer in range(2000)}
    save_file(many, served / "model.safetensors")
    found = opened(tiny, tmp_path, low_disk=True)
    assert found["tensors"].keys() == many.keys()
    header = 8 + int.from_bytes((served / "model.safetensors").read_bytes()[:8], "little")
    assert tiny.ranges("model.safetensors") == ["bytes=0-99999", f"bytes=100000-{header - 1}"]


def test_a_shard_is_held_from_its_first_to_its_last_step(tmp_path: Path) -> None:
    from qpack.sources.hub import Model

    model = Model("org/tiny", hub.COMMIT, tmp_path, {"a": 1, "b": 10, "c": 100})
    fetcher = ShardFetcher(model, tmp_path / "shards", {})
    assert fetcher.peak_bytes([]) == 0
    assert fetcher.peak_bytes([frozenset("a"), frozenset("b"), frozenset("c")]) == 100
    assert fetcher.peak_bytes([frozenset("ab"), frozenset("b"), frozenset("c")]) == 100
    assert fetcher.peak_bytes([frozenset("ac"), frozenset("b"), frozenset("c")]) == 110


def test_opening_a_local_source_needs_no_client(llama: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from qpack.sources import open_source\n"
        f"open_source({str(llama)!r}, work=Path({str(tmp_path)!r}))\n"
        "assert not {'huggingface_hub', 'torch', 'httpx2'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
