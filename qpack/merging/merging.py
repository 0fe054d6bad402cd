"""Merging an adapter into its base: a plain 16-bit checkpoint that any tool reads.

Each weight is ``round(dequantize(W) + scale * B @ A)``: the packed base that the adapter was trained on, changed in
f32, rounded once. Never back to 4 bits, where most codes would round to what they were and lose the adapter.

Names and shapes stay those of the base. So a packed GPT-2 or gpt-oss is refused: 16-bit checkpoints of these hold their
matrices transposed, and loaded from the packed ones' shapes the model would compute something else.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qpack import _core
from qpack.adapters.adapter import Adapter, Factors
from qpack.adapters.changes import Change, LowRank, Stored, View
from qpack.adapters.record import check_base
from qpack.checkpoint import CONFIG_NAME, Checkpoint
from qpack.companions import copy_companions, write_config
from qpack.errors import AdapterError, CheckpointError
from qpack.inspection import Inspection, inspect
from qpack.manifest import MANIFEST_NAME, Manifest
from qpack.output import new_directory
from qpack.policy.modules import OUTPUT_EMBEDDING, transposed_weights
from qpack.policy.plan import Part, Recipe
from qpack.sizes import parse_size

logger = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What `merge` did."""

    merged: int
    """Number of weights that the adapter changed."""
    result: Inspection
    """What the merged directory holds."""
    seconds: float


def merge(
    base: Path | str,
    adapter: Path | str,
    destination: Path | str,
    *,
    dtype: str = "bfloat16",
    max_shard_size: int | str = "5GB",
    threads: int | None = None,
    force: bool = False,
    on_progress: Callable[[int, int], object] | None = None,
) -> MergeReport:
    """Write ``base`` with ``adapter`` merged in to the new directory ``destination``, as ``dtype``.

    The base may be packed or plain. ``force`` replaces what is at ``destination``, and takes an adapter that was
    trained on another base. ``on_progress`` gets bytes of the base done and in all.

    Raises:
        CheckpointError: if the base is malformed, or has weights that 16-bit checkpoints of its family hold transposed.
        AdapterError: if the adapter is malformed, of a kind that cannot be merged, or of another base.
        OutputExistsError: if ``destination`` exists and ``force`` is not set, or is or holds an input.
        ValueError: for an illegal ``dtype`` or ``max_shard_size``.
    """
    start = time.monotonic()
    destination = Path(destination)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    max_shard_bytes = parse_size(max_shard_size)
    checkpoint = Checkpoint.open(base)
    opened = Adapter.open(adapter)
    opened.check_base(checkpoint)
    check_base([opened.path], checkpoint, force=force)
    _refuse_tied_head(checkpoint, opened)
    _refuse_transposed(checkpoint, opened)
    for name, factors in opened.factors.items():
        logger.debug("merge %s, rank %d, scale %g", name, factors.r, factors.scale)
    inputs = [checkpoint.directory, opened.path]
    with new_directory(destination, force=force, marker=CONFIG_NAME, inputs=inputs) as partial:
        _core.merge(
            checkpoint.shards,
            partial,
            _unpacked(checkpoint, dtype),
            {name: _change(opened.weights_path, factors) for name, factors in opened.factors.items()},
            mode="exact",
            quant_storage="uint8",
            inputs="",
            max_shard_bytes=max_shard_bytes,
            threads=threads or 0,
            on_progress=on_progress,
        )
        copy_companions(checkpoint.directory, partial)
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        config.pop("torch_dtype", None)
        write_config(partial, config | {"dtype": dtype})
    return MergeReport(len(opened.factors), inspect(destination), time.monotonic() - start)


def _unpacked(checkpoint: Checkpoint, dtype: str) -> list[Recipe]:
    """Every tensor as it is, floats in ``dtype``, packed weights unpacked."""
    recipes = []
    for name, shape in checkpoint.weights.items():
        floats = name in checkpoint.packed or checkpoint.tensors[name].dtype in ("BF16", "F16", "F32")
        recipes.append(Recipe(name, (Part(name, shape, dtype=dtype if floats else None),)))
    return recipes


def _change(file: Path, factors: Factors) -> Change:
    """``scale * B @ A``."""
    _, in_features = factors.shape
    left, right = Stored(file, factors.b), Stored(file, factors.a)
    term = LowRank(View(left, (factors.r, 1)), View(right, (in_features, 1)), factors.r, factors.scale)
    return Change((term,))


def _refuse_transposed(checkpoint: Checkpoint, adapter: Adapter) -> None:
    """Refuse a base whose weights, packed or changed, would be read the wrong way round from a 16-bit checkpoint."""
    recorded = (checkpoint.directory / MANIFEST_NAME).is_file()
    found = Manifest.read(checkpoint.directory).transposed if recorded else transposed_weights(checkpoint)
    if wrong := [name for name in found if name in checkpoint.packed or name in adapter.factors]:
        raise CheckpointError(
            f"{checkpoint.directory}: {wrong[0]} is (out_features, in_features), but 16-bit checkpoints of "
            f"{checkpoint.config.get('model_type')} have it transposed, so that what is merged would be read wrongly; "
            "load the base with qpack.load and the adapter with PEFT, or serve the two"
        )


def _refuse_tied_head(checkpoint: Checkpoint, adapter: Adapter) -> None:
    """Refuse a change of an output embedding that is also the input embedding: it would change both."""
    name = f"{OUTPUT_EMBEDDING}.weight"
    if name in adapter.factors and checkpoint.config.get("tie_word_embeddings"):
        raise AdapterError(f"{adapter.path}: changes {name}, which the base {checkpoint.directory} ties to its input")
