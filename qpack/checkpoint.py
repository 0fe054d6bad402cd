"""Reading a Hugging Face model directory: config.json, and safetensors files found through their index.

Everything is checked on open, from headers alone: the index against the files that it names, and the files against
the index. Refused: pickled weights (they run code when loaded), files outside the directory, tensors that only one of
index and file knows.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qpack._core import SUFFIXES, PackedInfo, TensorInfo, read_header, read_packed
from qpack.errors import CheckpointError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


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

    @classmethod
    def open(cls, directory: Path | str) -> "Checkpoint":
        """Open and check ``directory``."""
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: not a directory")
        config = read_json_object(directory / CONFIG_NAME)
        shards, placed = _find_shards(directory)
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            for info in read_header(shard):
                if placed is not None and placed.pop(info.name, None) != shard.name:
                    raise CheckpointError(f"{shard}: holds tensor {info.name}, which {INDEX_NAME} does not place there")
                tensors[info.name] = info
        if placed:
            name, file = next(iter(placed.items()))
            raise CheckpointError(f"{directory / file}: lacks tensor {name}, which {INDEX_NAME} places there")
        return cls(directory, config, shards, tensors)

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
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _find_shards(directory: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The weight files, and the index's tensor-to-file map where there is an index."""
    index = directory / INDEX_NAME
    if index.exists():
        placed = read_json_object(index).get("weight_map")
        if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
            raise CheckpointError(f"{index}: weight_map is not an object of file names")
        shards = []
        for file in sorted(set(placed.values())):
            if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
                raise CheckpointError(f"{index}: names {file!r}, which is not a file of this directory")
            if not (directory / file).is_file():
                raise CheckpointError(f"{directory / file}: no such file, but {INDEX_NAME} names it")
            shards.append(directory / file)
        return tuple(shards), placed
    single = directory / SINGLE_NAME
    if single.is_file():
        return (single,), None
    pickled = sorted(directory.glob("*.bin"))
    if pickled:
        raise CheckpointError(f"{pickled[0]}: pickled weights can run code when loaded; save them as safetensors first")
    raise CheckpointError(f"{directory}: no {INDEX_NAME} and no {SINGLE_NAME}")
