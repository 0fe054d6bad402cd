"""Checkpoints of any family without weights: config.json, and headers over a hole, from a model on the meta device.

What is about names and shapes alone runs on them as on real ones, in milliseconds and at any size.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from qpack.quiet import quiet_libraries

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


@contextmanager
def quiet() -> Iterator[None]:
    """Hush what transformers has to say about odd configurations."""
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def meta_model(family: str, **settings: Any) -> PreTrainedModel:
    """The model that AutoModelForCausalLM builds for a configuration of ``family``."""
    with quiet():
        return meta_model_of(AutoConfig.for_model(family, **settings))


def meta_model_of(config: PreTrainedConfig, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """The model that ``auto``, one of transformers' Auto classes, builds for ``config``."""
    with quiet(), torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, dtype=torch.bfloat16)
    return model


def stored_shapes(model: PreTrainedModel, *, fused: bool = False) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape by name of what ``save_pretrained`` writes; ``fused`` as transformers names it, not the hub."""
    state = dict(model.state_dict())
    for tied in model.all_tied_weights_keys:
        state.pop(tied, None)
    if not fused:
        state = revert_weight_conversion(model, state)
    return {name: (DTYPES.get(tensor.dtype, "I64"), tuple(tensor.shape)) for name, tensor in state.items()}


def write_skeleton(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> Path:
    """Write a model directory whose weights are a hole of the right size, and return it."""
    bits = {"BF16": 16, "F16": 16, "F32": 32, "I64": 64, "F8_E4M3": 8, "F8_E8M0": 8, "U8": 8}
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + bits[dtype] * math.prod(shape) // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (directory / "config.json").write_text(json.dumps(dict(config)))
    return directory


def skeleton(directory: Path, model: PreTrainedModel, *, fused: bool = False) -> Path:
    """Write a model directory like the one that ``model.save_pretrained`` would, without weights."""
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return write_skeleton(directory, config, stored_shapes(model, fused=fused))
