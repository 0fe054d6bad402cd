"""Tiny mixture-of-experts checkpoints, and the stock models that they stand for once they are packed.

Packed weights are decoded by bitsandbytes, and gpt-oss's experts put back into one tensor here: nothing of qpack.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors.torch import load_file, save_file
from tiny import write_tokenizer
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    Lfm2MoeConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.08,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**SIZES, intermediate_size=192, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES, intermediate_size=256, moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts=8
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_experts=8,
        norm_topk_prob=True,
        mlp_only_layers=[0],
    ),
    "olmoe": lambda: OlmoeConfig(**SIZES, intermediate_size=64, num_experts=8),
    "deepseek_v3": lambda: DeepseekV3Config(
        **SIZES | {"head_dim": 32},
        intermediate_size=256,
        moe_intermediate_size=64,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
    ),
    "glm4_moe": lambda: Glm4MoeConfig(
        **SIZES, intermediate_size=256, moe_intermediate_size=64, n_routed_experts=8, first_k_dense_replace=1
    ),
    "ernie4_5_moe": lambda: Ernie4_5_MoeConfig(
        **SIZES, intermediate_size=256, moe_intermediate_size=64, moe_num_experts=8, moe_k=2
    ),
    "minimax_m2": lambda: MiniMaxM2Config(**SIZES, intermediate_size=64, num_local_experts=8),
    "lfm2_moe": lambda: Lfm2MoeConfig(
        **SIZES,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_experts=8,
        num_dense_layers=1,
        layer_types=["conv", "full_attention"],
    ),
    "gpt_oss": lambda: GptOssConfig(**SIZES, intermediate_size=64, num_local_experts=4, sliding_window=64),
}
"""Two layers each, several with a dense or a shared part. All in_features are multiples of 64: bitsandbytes' CPU
dequantization, by which `decode` goes, is wrong for others."""

LAYOUTS = {"mixtral": "fused", "gpt_oss": "mxfp4"}
"""Other layouts that checkpoints of a family come in: all experts of a layer in one tensor, and in MXFP4."""


def write_source(family: str, directory: Path, layout: str = "") -> Path:
    """Write a bf16 checkpoint of ``family`` with a tokenizer, as transformers saves it, or in one of `LAYOUTS`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("bias"):  # made as zeros, which would hide a bias in the wrong place
                tensor.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(directory, save_original_format=layout != "fused")
    if layout == "mxfp4":
        tensors = load_file(directory / "model.safetensors")
        for name in [name for name in tensors if name.endswith((".gate_up_proj", ".down_proj"))]:
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = draw_mxfp4(tensors.pop(name).shape)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    write_tokenizer(directory)
    return directory


def draw_mxfp4(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks and scales of experts that are ``shape``, (experts, in_features, out_features), in 16 bits.

    The weights that they stand for have a standard deviation of 0.13.
    """
    experts, columns, rows = shape
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(115, 125, (experts, rows, columns // 32), dtype=torch.uint8)
    return blocks, scales


def decode(packed: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All weights of a packed checkpoint by name, what is in 4 bits as the values that it stands for in ``dtype``."""
    tensors = load_file(packed / "model.safetensors")
    weights = {}
    for name, tensor in tensors.items():
        if f"{name}.absmax" in tensors:
            parts = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
            state = QuantState.from_dict(parts, device=torch.device("cpu"))
            state.dtype = dtype  # else that of the source
            weights[name] = dequantize_4bit(tensor, state)
        elif ".weight." not in name:
            weights[name] = tensor
    return weights


def decoded_model(packed: Path) -> PreTrainedModel:
    """Stock transformers, in float32, on the weights that the packed checkpoint decodes to."""
    config = AutoConfig.from_pretrained(packed)
    del config.quantization_config
    weights = decode(packed, torch.float32)
    if config.model_type == "gpt_oss":
        weights = _fused(weights)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel = kind.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    return model


def _fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """gpt-oss's experts as transformers has them: (experts, in, out), gate and up in alternate columns."""
    result = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for prefix in sorted({name.split(".experts.")[0] + ".experts" for name in weights if ".experts." in name}):
        experts = range(sum(name.startswith(prefix) and name.endswith("down_proj.weight") for name in weights))
        for kind in ("weight", "bias"):
            gate, up, down = (
                torch.stack([weights[f"{prefix}.{expert}.{layer}.{kind}"] for expert in experts])
                for layer in ("gate_proj", "up_proj", "down_proj")
            )
            gate_up = torch.stack((gate, up), dim=2).flatten(1, 2)  # rows g0 u0 g1 u1 ...
            suffix = "_bias" if kind == "bias" else ""
            for layer, tensor in (("gate_up_proj", gate_up), ("down_proj", down)):
                result[f"{prefix}.{layer}{suffix}"] = tensor if kind == "bias" else tensor.transpose(1, 2).contiguous()
    return result
