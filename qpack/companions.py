"""The files beside the weights: tokenizer, chat template, generation settings, licence and the rest."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def copy_companions(source: Path, destination: Path) -> tuple[str, ...]:
    """Copy every top-level file of ``source`` except weights, config.json and hidden files; return their names."""
    copied = []
    for path in sorted(source.iterdir()):
        skipped = path.name == "config.json" or path.name.startswith(".") or any(map(path.match, _NOT_COPIED))
        if path.is_file() and not skipped:
            shutil.copyfile(path, destination / path.name)
            copied.append(path.name)
    return tuple(copied)


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write ``config`` as config.json, the way transformers lays it out."""
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
