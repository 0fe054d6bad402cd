"""Reading a Hugging Face model directory: config.json, and safetensors files found through their index.

Everything is checked on open, from headers alone: the index against the files that it names, and the files against
the index. Refused: pickled weights (they run code when loaded), files outside the directory, also through a symbolic
link, tensors that only one of index and file knows. The links of a Hugging Face cache are the exception: they lead from
``models--ORG--NAME/snapshots/COMMIT`` to ``models--ORG--NAME/blobs``.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qpack import _core
from qpack._core import SUFFIXES, PackedInfo, TensorInfo, read_header, read_packed
from qpack.errors import CheckpointError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"
PICKLED_NAME = "pytorch_model.bin"


@dataclass(frozen=True)
class Checkpoint:
    """An opened model directory.

    Raises:
        CheckpointError: from `open`, naming the file or tensor that is not as it should be.
    """

    directory: Path
    config: Mapping[str, Any]
    """config.json"""
    shards: tuple[Path, ...]
    """The safetensors files, in the order of their names."""
    tensors: Mapping[str, TensorInfo]
    """Every tensor by name, in the order of files and bytes."""
    files: Mapping[str, Path]
    """The file of every tensor."""

    @classmethod
    def open(cls, path: Path | str) -> "Checkpoint":
        """Open and check the model at ``path``: its directory, its index, or one safetensors file, which then is all.

        Beside an index or a file there must be a config.json.
        """
        path = Path(path)
        directory = path if path.is_dir() else path.parent
        weights = _find_weights(path)
        config = read_json_object(model_file(directory, CONFIG_NAME))
        if weights.suffix == ".safetensors":
            tensors = {info.name: info for info in read_header(weights)}
            return cls(directory, config, (weights,), tensors, dict.fromkeys(tensors, weights))
        index, placed = weights, read_index(weights)
        shards = tuple(model_file(directory, file) for file in sorted(set(placed.values())))
        tensors, files = {}, {}
        for shard in shards:
            if not shard.is_file():
                raise CheckpointError(f"{shard}: no such file, but {index.name} names it")
            for info in read_header(shard):
                if placed.pop(info.name, None) != shard.name:
                    raise CheckpointError(f"{shard}: holds tensor {info.name}, which {index.name} does not place there")
                tensors[info.name], files[info.name] = info, shard
        if placed:
            name, file = next(iter(placed.items()))
            raise CheckpointError(f"{directory / file}: lacks tensor {name}, which {index.name} places there")
        return cls(directory, config, shards, tensors, files)

    @cached_property
    def packed(self) -> Mapping[str, PackedInfo]:
        """The NF4 weights by name; each is checked to be complete."""
        return {info.name: info for info in read_packed(self.shards)}

    @cached_property
    def weights(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor of the model: packed weights with the shape they unpack to."""
        parts = {name + suffix for name in self.packed for suffix in SUFFIXES}
        shapes = {name: info.shape for name, info in self.tensors.items() if name not in parts}
        return shapes | {name: info.shape for name, info in self.packed.items()}

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(info.bytes for info in self.tensors.values())


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

    Raises:
        CheckpointError: if the file is missing, is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def model_file(directory: Path, name: str) -> Path:
    """The path of the file ``name`` of the model in ``directory``, whether or not there is one.

    Raises:
        CheckpointError: if it is a symbolic link out of the directory, other than one of a Hugging Face cache.
    """
    root = Path(os.path.realpath(directory))
    target = Path(os.path.realpath(directory / name))
    if root not in target.parents:
        blobs = root.parent.parent / "blobs"
        if root.parent.name != "snapshots" or target.parent != blobs:
            raise CheckpointError(f"{directory / name}: is a symbolic link to {target}, outside the model's directory")
    return directory / name


def read_index(path: Path) -> dict[str, str]:
    """The ``weight_map`` of an index: the file of every tensor, all of them plain names.

    Raises:
        CheckpointError: if there is none, or it is malformed, places a tensor twice or outside the directory.
    """
    try:
        return _core.read_index(model_file(path.parent, path.name))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None


def find_pickled(path: Path) -> tuple[Path, ...]:
    """The pickled files, or their index, of the model at ``path``, if it has no other weights."""
    if path.is_dir():
        if (path / INDEX_NAME).exists() or (path / SINGLE_NAME).exists():
            return ()
        for name in (PICKLED_INDEX_NAME, PICKLED_NAME):
            if (path / name).exists():
                return (path / name,)
        return tuple(sorted(entry for entry in path.iterdir() if entry.suffix in PICKLED_SUFFIXES))
    pickled = path.name.endswith((*PICKLED_SUFFIXES, ".bin.index.json"))
    return (path,) if pickled and path.exists() else ()


def _find_weights(path: Path) -> Path:
    """The index at ``path``, or else the only safetensors file."""
    if pickled := find_pickled(path):
        raise CheckpointError(f"{pickled[0]}: pickled weights can run code when loaded; save them as safetensors first")
    if path.is_dir():
        if (path / INDEX_NAME).exists():
            return path / INDEX_NAME
        if not (path / SINGLE_NAME).is_file():
            raise CheckpointError(f"{path}: no {INDEX_NAME} and no {SINGLE_NAME}")
        return model_file(path, SINGLE_NAME)
    if path.name.endswith(".index.json"):
        return path
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: not a directory")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return model_file(path.parent, path.name)
