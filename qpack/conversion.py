"""Packing a checkpoint: a Hugging Face model directory in, a bitsandbytes NF4 model directory out.

The result loads in stock transformers, PEFT and vLLM. Which weights are packed is decided in `qpack.modules`; the
arithmetic and the streaming are Rust, with a few chunks a thread in memory whatever the size of the model.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpack import _core, modules
from qpack.checkpoint import CONFIG_NAME, Checkpoint
from qpack.companions import copy_companions, write_config
from qpack.errors import CheckpointError
from qpack.inspection import Inspection, inspect
from qpack.manifest import Manifest, WeightError
from qpack.output import new_directory, refuse_full_disk
from qpack.plan import Packing, Part, Recipe
from qpack.sizes import parse_size

logger = logging.getLogger(__name__)

_TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What `convert` did."""

    source_bytes: int
    """Bytes of the source's tensors."""
    resumed_bytes: int
    """How many of them an interrupted run had dealt with."""
    result: Inspection
    """What the packed directory holds."""
    seconds: float


def convert(
    source: Path | str,
    destination: Path | str,
    *,
    mode: str = "exact",
    blocksize: int = 64,
    double_quant: bool = True,
    quant_storage: str = "uint8",
    max_shard_size: int | str = "5GB",
    threads: int | None = None,
    force: bool = False,
    on_progress: Callable[[int, int], object] | None = None,
) -> ConvertReport:
    """Pack the model in ``source`` to NF4 and write it to the new directory ``destination``.

    Codes and scales are those of bitsandbytes on a CPU. The bytes written do not depend on ``threads`` (all cores by
    default). ``on_progress`` gets bytes of source done and in all.

    Raises:
        CheckpointError: if the source is malformed, of an unknown family, or holds weights that are not finite.
        OutputExistsError: if ``destination`` exists and ``force`` is not set, or is or holds an input.
        ValueError: for an illegal ``blocksize`` or ``max_shard_size``.
    """
    start = time.monotonic()
    destination = Path(destination)
    if blocksize not in _core.BLOCKSIZES:
        raise ValueError(f"blocksize is {blocksize}, expected one of {', '.join(map(str, _core.BLOCKSIZES))}")
    max_shard_bytes = parse_size(max_shard_size)
    checkpoint = Checkpoint.open(source)
    weights = modules.packable(checkpoint)
    packing = Packing(blocksize, double_quant)
    recipes = [
        Recipe(name, (Part(name, info.shape, packing if name in weights else None),))
        for name, info in checkpoint.tensors.items()
    ]
    config = dict(checkpoint.config) | {
        "quantization_config": _quantization_config(checkpoint, weights, double_quant, quant_storage)
    }
    for recipe in recipes:
        for part in recipe.parts:
            logger.debug("%s %s %s", "pack" if part.packing else "keep", part.name, part.shape)
    options = {
        "mode": mode,
        "blocksize": blocksize,
        "double_quant": double_quant,
        "quant_storage": quant_storage,
        "max_shard_size": max_shard_bytes,
    }
    files = _core.plan_pack(checkpoint.shards, recipes, quant_storage=quant_storage, max_shard_bytes=max_shard_bytes)
    refuse_full_disk(destination, sum(size for _, size in files))
    inputs = _inputs_text(checkpoint, options)
    with new_directory(
        destination, force=force, marker=CONFIG_NAME, inputs=[checkpoint.directory], resume=inputs
    ) as partial:
        written = _core.pack(
            checkpoint.shards,
            partial,
            recipes,
            mode=mode,
            quant_storage=quant_storage,
            inputs=inputs,
            max_shard_bytes=max_shard_bytes,
            threads=threads or 0,
            on_progress=on_progress,
        )
        copy_companions(checkpoint.directory, partial)
        write_config(partial, config)
        kept = {part.name: part.reason for recipe in recipes for part in recipe.parts if part.packing is None}
        Manifest(
            version=_core.__version__,
            options=options,
            source={
                "name": checkpoint.directory.resolve().name,
                "digest": written.source_fingerprint,
                "bytes": checkpoint.tensor_bytes,
                "tensors": len(checkpoint.tensors),
            },
            fingerprint=written.fingerprint,
            tensors=written.digests,
            errors={name: WeightError(*error) for name, error in written.errors.items()},
            kept=kept,
        ).write(partial)
    return ConvertReport(
        source_bytes=checkpoint.tensor_bytes,
        resumed_bytes=written.resumed_bytes,
        result=inspect(destination),
        seconds=time.monotonic() - start,
    )


def _inputs_text(checkpoint: Checkpoint, options: dict[str, Any]) -> str:
    """A text that changes with all that the output depends on: an interrupted run of another is not gone on with.

    Files are told apart by size and time of change, as make does; that their bytes are the same is not read again.
    """
    stats = {shard.name: shard.stat() for shard in checkpoint.shards}
    files = {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats.items()}
    text = {"version": _core.__version__, "options": options, "directory": str(checkpoint.directory.resolve())}
    return json.dumps(text | {"files": files, "config": checkpoint.config}, sort_keys=True)


def _quantization_config(
    checkpoint: Checkpoint, weights: dict[str, tuple[int, ...]], double_quant: bool, quant_storage: str
) -> dict[str, Any]:
    """transformers' `BitsAndBytesConfig` for what is written.

    ``llm_int8_skip_modules`` always names the output embedding: any list at all switches transformers' own defaults
    off, and vLLM would quantize on the fly a Linear that is not named.
    """
    dtypes = {checkpoint.tensors[name].dtype for name in weights}
    if len(dtypes) != 1 or not dtypes <= _TORCH_DTYPES.keys():
        found = ", ".join(sorted(dtypes))
        raise CheckpointError(f"{checkpoint.directory}: layer weights are {found}, expected all BF16, F16 or F32")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": _TORCH_DTYPES[dtypes.pop()],
        "bnb_4bit_quant_storage": quant_storage,
        "llm_int8_skip_modules": [modules.OUTPUT_EMBEDDING],
    }
