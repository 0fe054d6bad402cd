"""Tiny mixture-of-experts checkpoints, the same packed by bitsandbytes itself, and the models that those stand for.

The writer packs one 2-D weight an expert under the names that checkpoints have on the hub, with gpt-oss's fused and
interleaved experts taken apart. It uses ``quantize_4bit`` and ``QuantState.as_dict``, nothing of qpack.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
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

KEPT = re.compile(r".*\.(gate|router|shared_expert_gate)\.weight|.*\.conv\.conv\.weight")
"""Two-dimensional weights of layers that stay as they are."""


def write_source(family: str, directory: Path) -> Path:
    """Write a bf16 checkpoint of ``family`` with a tokenizer, as transformers saves it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("bias"):  # made as zeros, which would hide a bias in the wrong place
                tensor.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def write_packed(source: Path, directory: Path, keep: str = "") -> Path:
    """Pack the layers' Linear weights and all experts of ``source`` to NF4 with double quantization.

    Weights whose name begins with ``keep`` stay in 16 bits.
    """
    directory.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    kept = {"lm_head"}

    def stays(name: str) -> bool:
        return KEPT.fullmatch(name) is not None or (keep != "" and name.startswith(keep))

    for name, tensor in _unfused(load_file(source / "model.safetensors")).items():
        if re.fullmatch(r"model\.layers\..*\.weight", name) and tensor.dim() == 2 and not stays(name):
            codes, state = quantize_4bit(tensor, blocksize=64, compress_statistics=True, quant_type="nf4")
            tensors[name] = codes
            tensors |= {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
        else:
            tensors[name] = tensor
            if stays(name):
                kept.add(name.removesuffix(".weight"))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(kept),
    }
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    return directory


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


def _unfused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """gpt-oss's experts one by one: its weights are (experts, in, out), gate and up in alternate columns."""
    result = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias)?", name)
        if match is None:
            result[name] = tensor
            continue
        prefix, layer, kind = match[1], match[2], "bias" if match[3] else "weight"
        for expert, columns in enumerate(tensor):
            rows = columns if kind == "bias" else columns.T
            parts = {"gate_proj": rows[::2], "up_proj": rows[1::2]} if layer == "gate_up_proj" else {layer: rows}
            result |= {f"{prefix}.{expert}.{part}.{kind}": part_rows.contiguous() for part, part_rows in parts.items()}
    return result


def _fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The opposite of `_unfused`."""
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
