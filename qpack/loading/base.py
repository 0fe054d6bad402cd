"""What can be loaded packed: a whole checkpoint of bitsandbytes NF4 weights. Told without torch."""

from pathlib import Path

from qpack.checkpoint import CONFIG_NAME, Checkpoint
from qpack.errors import CheckpointError


def require_packed(base: Path) -> Checkpoint:
    """Open a packed checkpoint and refuse any other directory, from its config and its headers alone.

    Raises:
        CheckpointError: a file is missing or malformed, or the weights are not declared to be 4-bit NF4 or are not.
    """
    checkpoint = Checkpoint.open(base)
    declared = checkpoint.config.get("quantization_config") or {}
    for key, expected in (("quant_method", "bitsandbytes"), ("load_in_4bit", True), ("bnb_4bit_quant_type", "nf4")):
        if declared.get(key) != expected:
            raise CheckpointError(
                f"{base / CONFIG_NAME}: expected {key} {expected!r} in quantization_config, found "
                f"{declared.get(key)!r}; run `qpack convert` on the model first"
            )
    if not checkpoint.packed:
        raise CheckpointError(f"{base}: no weight is packed; run `qpack convert` on the model first")
    return checkpoint
