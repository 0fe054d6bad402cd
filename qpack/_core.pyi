"""The Rust extension: safetensors files, NF4 and LoRA arithmetic, streaming writers.

Malformed files raise `qpack.errors.CheckpointError`, refusals of the operating system `OSError` with its file name,
illegal arguments `ValueError`. Long calls release the GIL, call ``on_progress(done, total)`` in bytes of source about
ten times a second and once at the end, and stop on Ctrl-C or on an exception from that callback.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from os import PathLike
from typing import Any, TypeAlias, final

from numpy.typing import NDArray
from typing_extensions import Buffer

__all__ = [
    "BLOCKSIZES",
    "ISA",
    "SUFFIXES",
    "PackedInfo",
    "TensorInfo",
    "Written",
    "__version__",
    "check_finite",
    "dequantize_nf4",
    "dequantize_nf4_into",
    "merge",
    "nested_quant_map",
    "pack",
    "quantize_nested",
    "quantize_nf4",
    "quantize_nf4_into",
    "read_header",
    "read_packed",
]

# numpy's arrays say that they are buffers from Python 3.12 on.
_Buffer: TypeAlias = Buffer | NDArray[Any]

__version__: str

ISA: str
"""The vector instructions in use: portable, avx2 or avx512; held down by the environment variable QPACK_ISA."""

BLOCKSIZES: tuple[int, ...]
"""Weights per block scale that bitsandbytes accepts."""

SUFFIXES: tuple[str, ...]
"""What the names of the tensors beside a packed weight add to its own name."""

@final
class TensorInfo:
    """One tensor of a safetensors file; dtype by its safetensors name."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def bytes(self) -> int: ...

@final
class PackedInfo:
    """One packed weight: its shape and (torch) dtype before packing, and the bytes of all its tensors."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def blocksize(self) -> int: ...
    @property
    def double_quant(self) -> bool: ...
    @property
    def bytes(self) -> int: ...

@final
class Written:
    """The safetensors files that a call wrote, in order, and the bytes of their tensors."""

    @property
    def files(self) -> list[str]: ...
    @property
    def tensor_bytes(self) -> int: ...

def read_header(path: str | PathLike[str]) -> list[TensorInfo]:
    """Validate a safetensors file's header and list its tensors in the order of their bytes."""

def read_packed(shards: Sequence[str | PathLike[str]]) -> list[PackedInfo]:
    """List the packed weights of these files, each checked to be complete."""

def check_finite(path: str | PathLike[str]) -> None:
    """Raise `CheckpointError`, naming tensor and flat index, if a float of this file is NaN or infinite."""

def pack(
    shards: Sequence[str | PathLike[str]],
    directory: str | PathLike[str],
    weights: Set[str],
    *,
    blocksize: int,
    double_quant: bool,
    max_shard_bytes: int,
    threads: int,
    on_progress: Callable[[int, int], object] | None = None,
) -> Written:
    """Write the tensors of ``shards`` to ``directory``, those in ``weights`` as NF4; ``threads=0`` takes all cores."""

def merge(
    shards: Sequence[str | PathLike[str]],
    adapter: str | PathLike[str],
    directory: str | PathLike[str],
    deltas: Mapping[str, tuple[str, str, float]],
    *,
    dtype: str,
    max_shard_bytes: int,
    threads: int,
    on_progress: Callable[[int, int], object] | None = None,
) -> Written:
    """Write the weights of ``shards`` to ``directory`` in ``dtype``, unpacked, with ``scale * B @ A`` added.

    ``deltas`` maps a weight's name to the names of A and B in the file ``adapter``, and to the scale.
    """

def quantize_nf4(weights: bytes, dtype: str, blocksize: int) -> tuple[bytes, bytes]:
    """Codes (half a byte a weight) and absmax (f32 per block) of little-endian ``weights``."""

def dequantize_nf4(codes: bytes, absmax: bytes, elements: int, dtype: str, blocksize: int) -> bytes:
    """The weights that codes and absmax (f32) stand for, rounded once to ``dtype``."""

def quantize_nf4_into(weights: _Buffer, dtype: str, blocksize: int, codes: _Buffer, absmax: _Buffer) -> None:
    """As `quantize_nf4`, from and to memory that the caller owns; nothing is copied.

    ``weights`` is the n little-endian values of ``dtype`` as a contiguous buffer of bytes; ``codes`` takes (n + 1) // 2
    bytes, ``absmax`` one f32 per started block. A read-only output, a wrong size or shared memory is a `ValueError`,
    another type of items a `BufferError`; a value that is not finite a `ValueError` with its index, after which the
    outputs are unspecified. The GIL is released: nothing else may write to the buffers meanwhile.
    """

def dequantize_nf4_into(codes: _Buffer, absmax: _Buffer, dtype: str, blocksize: int, weights: _Buffer) -> None:
    """As `dequantize_nf4`, from and to memory that the caller owns; nothing is copied.

    ``codes`` is bytes and ``absmax`` f32; ``weights`` takes the values of ``dtype``, as many as it has room for, as a
    buffer of bytes. Refusals are those of `quantize_nf4_into`.
    """

def quantize_nested(absmax: bytes, offset: float | None = None) -> tuple[bytes, bytes, float]:
    """Codes, second-level absmax (f32) and offset of block scales (f32); the offset defaults to their mean."""

def nested_quant_map() -> bytes:
    """The 256 levels (f32) that block scales are quantized to."""
