"""LoRA adapters for tests that are about files: factors drawn from a seed, of the shapes that a base asks for."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qpack.checkpoint import Checkpoint

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "task_type": "CAUSAL_LM"}


def draw(base: Path, *, r: int = 4, seed: int = 0, modules: Sequence[str] = ("q_proj",)) -> dict[str, torch.Tensor]:
    """Both factors of every weight of ``base`` whose module is one of ``modules``, in f32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in Checkpoint.open(base).weights.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in modules:
            outputs, inputs = shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(r, inputs, generator=generator) * 0.1
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(outputs, r, generator=generator) * 0.1
    return tensors


def write(directory: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    """Write an adapter as PEFT does, with ``settings`` over the usual ones, and return its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    leaves = sorted({name.split(".")[-3] for name in tensors})
    config = CONFIG | {"target_modules": leaves} | settings
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
