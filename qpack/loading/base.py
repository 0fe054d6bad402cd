"""What a base is: a whole checkpoint of bitsandbytes NF4 weights, or one that is not quantized. Told without torch."""

from pathlib import Path

from qpack.checkpoint import CONFIG_NAME, Checkpoint
from qpack.errors import CheckpointError


def require_packed(base: Path, *, hint: str = "run `qpack convert` on the model first") -> Checkpoint:
    """Open a packed checkpoint and refuse any other directory, from its config and its headers alone.

    ``hint`` says what can be done with one that is not.

    Raises:
        CheckpointError: a file is missing or malformed, or the weights are not declared to be 4-bit NF4 or are not.
    """
    checkpoint = Checkpoint.open(base)
    declared = checkpoint.config.get("quantization_config") or {}
    for key, expected in (("quant_method", "bitsandbytes"), ("load_in_4bit", True), ("bnb_4bit_quant_type", "nf4")):
        if declared.get(key) != expected:
            raise CheckpointError(
                f"{base / CONFIG_NAME}: expected {key} {expected!r} in quantization_config, found "
                f"{declared.get(key)!r}; {hint}"
            )
    if not checkpoint.packed:
        raise CheckpointError(f"{base}: no weight is packed; {hint}")
    return checkpoint


def require_plain(base: Path, *, hint: str) -> Checkpoint:
    """Open a checkpoint that is not quantized and refuse any other directory, as `require_packed` does.

    Raises:
        CheckpointError: a file is missing or malformed, or the weights are quantized.
    """
    checkpoint = Checkpoint.open(base)
    declared = checkpoint.config.get("quantization_config")
    if declared is not None or checkpoint.packed:
        method = (declared or {}).get("quant_method", "bitsandbytes")
        raise CheckpointError(f"{base}: expected weights of 16 or 32 bits, found {method}; {hint}")
    return checkpoint
