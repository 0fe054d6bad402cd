"""Packing a checkpoint: a Hugging Face model directory in, a bitsandbytes NF4 model directory out.

The result loads in stock transformers, PEFT and vLLM. Which weights are packed is decided in `qpack.modules`; the
arithmetic and the streaming are Rust, with a few chunks a thread in memory whatever the size of the model.
"""

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
from qpack.output import new_directory
from qpack.plan import Packing
from qpack.sizes import parse_size

logger = logging.getLogger(__name__)

_TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What `convert` did."""

    source_bytes: int
    """Bytes of the source's tensors."""
    result: Inspection
    """What the packed directory holds."""
    seconds: float


def convert(
    source: Path | str,
    destination: Path | str,
    *,
    blocksize: int = 64,
    double_quant: bool = True,
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
    planned = _dense(checkpoint, Packing(blocksize, double_quant))
    weights = planned.packed
    config = dict(checkpoint.config) | {"quantization_config": _quantization_config(checkpoint, planned, double_quant)}
    for name, info in checkpoint.tensors.items():
        logger.debug("%s %s %s %s", "pack" if name in weights else "keep", name, info.dtype, info.shape)
    inputs = [checkpoint.directory]
    with new_directory(destination, force=force, marker=CONFIG_NAME, inputs=inputs) as partial:
        _core.pack(
            checkpoint.shards,
            partial,
            set(weights),
            blocksize=blocksize,
            double_quant=double_quant,
            max_shard_bytes=max_shard_bytes,
            threads=threads or 0,
            on_progress=on_progress,
        )
        copy_companions(checkpoint.directory, partial)
        write_config(partial, config)
    return ConvertReport(checkpoint.tensor_bytes, inspect(destination), time.monotonic() - start)


def _dense(checkpoint: Checkpoint, packing: Packing) -> modules.Plan:
    """The plan, if every tensor keeps its name and layout."""
    planned = modules.plan(checkpoint, packing=packing)
    for recipe in planned.recipes:
        if recipe.scale or len(recipe.parts) > 1 or recipe.parts[0].transpose or recipe.parts[0].name != recipe.source:
            raise CheckpointError(f"{checkpoint.directory}: cannot pack {recipe.source}, which changes its layout")
    return planned


def _quantization_config(checkpoint: Checkpoint, planned: modules.Plan, double_quant: bool) -> dict[str, Any]:
    """transformers' `BitsAndBytesConfig` for what is written."""
    dtypes = {checkpoint.tensors[name].dtype for name in planned.packed}
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
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(planned.skip_modules),
    }
