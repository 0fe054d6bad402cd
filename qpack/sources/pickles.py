"""Pickled weights (``torch.save``), rewritten as safetensors so that everything after reads one format.

Only for users who asked for it: torch's restricted unpickler builds tensors and plain containers, and refuses anything
else by name. One file at a time, mapped into memory where its format allows, written tensor by tensor; names that share
storage each get their bytes.
"""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpack.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    PICKLED_INDEX_NAME,
    SINGLE_NAME,
    find_pickled,
    model_file,
    read_index,
)
from qpack.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# safetensors' names of torch's types.
_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}


def rewrite(path: Path, directory: Path) -> Path:
    """Write the pickled weights of the model at ``path``, with its config, to ``directory``, and return that.

    Raises:
        CheckpointError: if a file holds anything but tensors by name, or the index and the files do not agree.
    """
    model = path if path.is_dir() else path.parent
    pickled = find_pickled(path)
    index = pickled[0] if pickled[0].name.endswith(".index.json") else None
    if index is None and len(pickled) > 1:
        raise CheckpointError(f"{model}: holds {len(pickled)} pickled files and no {PICKLED_INDEX_NAME}")
    config = model_file(model, CONFIG_NAME)
    if not config.is_file():
        raise CheckpointError(f"{config}: no such file")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_NAME).write_bytes(config.read_bytes())
    (directory / INDEX_NAME).unlink(missing_ok=True)
    if index is None:
        _rewrite_file(model_file(model, pickled[0].name), directory / SINGLE_NAME)
        return directory
    renamed = {}
    placed = read_index(index)
    for file in sorted(set(placed.values())):
        renamed[file] = f"{Path(file).stem}.safetensors"
        _rewrite_file(model_file(model, file), directory / renamed[file])
    text = json.dumps({"weight_map": {name: renamed[file] for name, file in placed.items()}})
    (directory / INDEX_NAME).write_text(text, encoding="utf-8")
    return directory


def _rewrite_file(path: Path, target: Path) -> None:
    tensors = _load(path)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        dtype = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None or str(tensor.layout) != "torch.strided" or tensor.is_quantized:
            raise CheckpointError(f"{path}: tensor {name}: {tensor.dtype}, {tensor.layout}: has no safetensors form")
        start, end = end, end + tensor.nelement() * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(_bytes(tensor))


def _bytes(tensor: "torch.Tensor") -> memoryview:
    import torch

    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _load(path: Path) -> Mapping[str, "torch.Tensor"]:
    try:
        import torch
    except ModuleNotFoundError:
        raise CheckpointError(f"{path}: reading pickled weights needs torch: pip install 'qpack[train]'") from None
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, but {PICKLED_INDEX_NAME} names it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which protocol an old file was pickled with
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL \S+|Unsupported (?:operand|class|global).*", str(error))
        reason = f" ({found[0]})" if found else ""
        raise CheckpointError(f"{path}: refused: holds something else than tensors{reason}") from None
    except (RuntimeError, EOFError, KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path}: not a file of pickled tensors: {type(error).__name__}: {reason}") from None
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: {name!r} is {type(value).__name__}, expected tensors by name")
    return content
