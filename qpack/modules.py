"""Which weights of a model are packed.

The rule is transformers': every ``nn.Linear`` except the output embedding and weights tied to it. For the families
below it follows from names alone, so that packing needs neither torch nor transformers; a test builds each family on
the meta device and compares with transformers' own replacement.
"""

import re
from collections.abc import Mapping

from qpack.checkpoint import Checkpoint
from qpack.errors import CheckpointError

FAMILIES = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "olmo",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "starcoder2",
    }
)
"""Values of ``model_type``: dense decoders in which every two-dimensional weight of a layer belongs to a Linear."""

_LAYER_WEIGHT = re.compile(r"model\.layers\.\d+\..+\.weight")

OUTPUT_EMBEDDING = "lm_head"


def packable(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name and shape (out_features, in_features) of every weight that transformers would load in 4 bits.

    Raises:
        CheckpointError: for a model that is quantized already, of a family that is not known, or without such weights.
    """
    config = checkpoint.directory / "config.json"
    quantization = checkpoint.config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise CheckpointError(f"{config}: the model is quantized already ({method}); expected 16 or 32-bit weights")
    model_type = checkpoint.config.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"{config}: model_type is {model_type!r}, expected one of {known}")
    found: dict[str, tuple[int, ...]] = {
        name: info.shape
        for name, info in checkpoint.tensors.items()
        if _LAYER_WEIGHT.fullmatch(name) and len(info.shape) == 2
    }
    if not found:
        raise CheckpointError(f"{checkpoint.directory}: no weight of a layer under model.layers")
    return found
