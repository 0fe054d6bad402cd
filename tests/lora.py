"""LoRA adapters by stock PEFT, and what checkpoints hold, packed ones by bitsandbytes."""

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qpack


def write_adapter(directory: Path, base: Path, **settings: Any) -> Path:
    """A LoRA adapter for ``base`` by stock PEFT, with both factors drawn at random."""
    plain: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**(plain | settings)))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    model.save_pretrained(str(directory), save_embedding_layers=False)
    return directory


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def unpacked(packed: Path) -> dict[str, torch.Tensor]:
    """Every weight of a packed checkpoint in f32, by bitsandbytes."""
    stored = tensors(packed)
    weights = {}
    for name in [weight.name for weight in qpack.inspect(packed).packed]:
        parts = {key.removeprefix(name + "."): value for key, value in stored.items() if key.startswith(name + ".")}
        codes = stored.pop(name)
        for key in parts:
            del stored[f"{name}.{key}"]
        state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
        state.dtype = torch.float32
        weights[name] = bnb.dequantize_4bit(codes, state)
    return stored | weights
