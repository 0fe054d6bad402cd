"""LoRA adapters by stock PEFT, and what checkpoints hold, packed ones by bitsandbytes."""

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qpack

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}


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


def draw_adapter(directory: Path, base: Path, *, seed: int = 1, **settings: Any) -> Path:
    """An adapter by stock PEFT, in f32, with everything that it trains drawn at random."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**LORA | settings)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (
                parameter.data * (1 + 0.1 * torch.randn(parameter.shape)) + torch.randn(parameter.shape) * 0.05
            )
    model.save_pretrained(str(directory))
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


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """F64 to bf16, to nearest, ties to even; torch's own cast goes by way of f32 and rounds twice."""
    bits = weight.view(torch.int64)
    bits = (bits + (1 << 44) - 1 + ((bits >> 45) & 1)) >> 45 << 45  # 52 bits of mantissa to 7
    return bits.view(torch.float64).to(torch.bfloat16)
