"""The files beside the weights: tokenizer, chat template, generation settings, licence and the rest."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpack.checkpoint import model_file

# Weights in any form, their indices, and what is written anew.
_NOT_COPIED = (
    "qpack.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.gguf",
)

_TOKENIZER = (
    "added_tokens.json",
    "chat_template.*",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab.*",
)


def find_companions(source: Path) -> tuple[Path, ...]:
    """Every top-level file of ``source`` except weights, config.json and hidden files.

    Raises:
        CheckpointError: if one is a symbolic link out of ``source``.
    """
    found = []
    for path in sorted(source.iterdir()):
        skipped = path.name == "config.json" or path.name.startswith(".") or any(map(path.match, _NOT_COPIED))
        if not skipped and path.is_file():
            found.append(model_file(source, path.name))
    return tuple(found)


def copy_companions(source: Path, destination: Path) -> tuple[str, ...]:
    """Copy what `find_companions` finds; return the names."""
    companions = find_companions(source)
    for path in companions:
        shutil.copyfile(path, destination / path.name)
    return tuple(path.name for path in companions)


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy the files of the tokenizer that stands in ``source``, if one does, and its chat template."""
    for path in find_companions(source):
        if any(map(path.match, _TOKENIZER)):
            shutil.copyfile(path, destination / path.name)


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write ``config`` as config.json, the way transformers lays it out."""
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
