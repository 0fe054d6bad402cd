"""Sources that are quantized already: which of their tensors decode which others, and the shapes that come out.

Accepted are FP8 with one scale per 128 x 128 weights, as DeepSeek-V3 (``X.weight`` F8_E4M3, ``X.weight_scale_inv`` F32
or F8_E8M0), and MXFP4, as gpt-oss (``X_blocks`` U8 with two codes a byte, ``X_scales`` U8, one per 32 weights). Every
other method is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpack._core import TensorInfo
from qpack.checkpoint import CONFIG_NAME, Checkpoint
from qpack.errors import CheckpointError

FLOATS = frozenset({"BF16", "F16", "F32"})
"""safetensors' names of the types that a weight is stored in when it is not encoded."""

_FP8 = "F8_E4M3"
_FP8_BLOCK = 128
_FP8_SCALE = "_scale_inv"
_FP8_SCALE_TYPES = frozenset({"F32", "F8_E8M0"})
_MXFP4_BLOCKS, _MXFP4_SCALES = "_blocks", "_scales"
_MXFP4_BLOCK_BYTES = 16


@dataclass(frozen=True, slots=True)
class Source:
    """A stored tensor, seen as what it decodes to."""

    stored: str
    """Name of the tensor in the file."""
    name: str
    """What it would be called, were it not encoded."""
    shape: tuple[int, ...]
    """As decoded: (out_features, in_features), with the number of experts in front for a fused tensor."""
    dtype: str
    """safetensors' name of the stored type."""
    scale: str | None = None
    """Name of the tensor that decodes it."""
    block: tuple[int, int] | None = None
    """Rows and columns that one scale of FP8 is for."""


def read_sources(checkpoint: Checkpoint) -> list[Source]:
    """All tensors of ``checkpoint`` but those that only decode others, in the order of files and bytes.

    Raises:
        CheckpointError: if the model is quantized in another way, or if scales are missing or of another shape.
    """
    method = _method(checkpoint.directory / CONFIG_NAME, checkpoint.config)
    sources, scales = [], set()
    for name, info in checkpoint.tensors.items():
        if method == "fp8" and info.dtype == _FP8:
            source = _fp8(checkpoint, info)
        elif method == "mxfp4" and name.endswith(_MXFP4_BLOCKS):
            source = _mxfp4(checkpoint, info)
        else:
            source = Source(name, name, info.shape, info.dtype)
        sources.append(source)
        scales.add(source.scale)
    return [source for source in sources if source.stored not in scales]


def _method(path: Path, config: Mapping[str, Any]) -> str | None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if method == "fp8":
        block = quantization.get("weight_block_size")
        if block != [_FP8_BLOCK, _FP8_BLOCK]:
            found = f"weight_block_size {block}, expected [{_FP8_BLOCK}, {_FP8_BLOCK}]"
            raise CheckpointError(f"{path}: the model is quantized already (fp8) with {found}")
    elif method != "mxfp4":
        expected = "16 or 32-bit weights, fp8 or mxfp4"
        raise CheckpointError(f"{path}: the model is quantized already ({method}); expected {expected}")
    return str(method)


def _fp8(checkpoint: Checkpoint, info: TensorInfo) -> Source:
    if len(info.shape) != 2:
        found = f"{info.dtype} of shape {info.shape}"
        raise CheckpointError(f"{checkpoint.directory}: {info.name} is {found}, expected (out_features, in_features)")
    expected = tuple(-(-size // _FP8_BLOCK) for size in info.shape)
    scale = _scale(checkpoint, info, info.name + _FP8_SCALE, expected, _FP8_SCALE_TYPES)
    return Source(info.name, info.name, info.shape, info.dtype, scale, (_FP8_BLOCK, _FP8_BLOCK))


def _mxfp4(checkpoint: Checkpoint, info: TensorInfo) -> Source:
    *rows, blocks, width = info.shape if len(info.shape) >= 3 else (0, 0, 0)
    if info.dtype != "U8" or width != _MXFP4_BLOCK_BYTES:
        found = f"{info.dtype} of shape {info.shape}"
        raise CheckpointError(f"{checkpoint.directory}: {info.name} is {found}, expected U8 of shape (..., 16)")
    name = info.name.removesuffix(_MXFP4_BLOCKS)
    scale = _scale(checkpoint, info, name + _MXFP4_SCALES, (*rows, blocks), {"U8"})
    return Source(info.name, name, (*rows, blocks * 2 * width), info.dtype, scale)


def _scale(
    checkpoint: Checkpoint, info: TensorInfo, name: str, shape: tuple[int, ...], dtypes: frozenset[str] | set[str]
) -> str:
    """Check that the tensor ``name`` can decode ``info``, and return its name."""
    scale = checkpoint.tensors.get(name)
    if scale is None:
        raise CheckpointError(f"{checkpoint.directory}: no tensor {name}, which decodes {info.name}")
    if scale.shape != shape or scale.dtype not in dtypes:
        expected = f"{' or '.join(sorted(dtypes))} of shape {shape}"
        raise CheckpointError(
            f"{checkpoint.directory}: {name} is {scale.dtype} of shape {scale.shape}, expected {expected}"
        )
    return name
