"""The Rust extension: safetensors files, NF4 and LoRA arithmetic, streaming writers.

Malformed files raise `qpack.errors.CheckpointError`, refusals of the operating system `OSError` with its file name,
illegal arguments `ValueError`. Long calls release the GIL, call ``on_progress(done, total)`` in bytes of source about
ten times a second and once at the end, and stop on Ctrl-C or on an exception from that callback.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeAlias, final

from numpy.typing import NDArray
from typing_extensions import Buffer

from qpack.adapters.changes import AnyChange
from qpack.policy.plan import Packing, Recipe

__all__ = [
    "BLOCKSIZES",
    "ISA",
    "LEVELS",
    "SUFFIXES",
    "Comparison",
    "PackedInfo",
    "TensorInfo",
    "WeightStatistics",
    "Written",
    "__version__",
    "broken_weights",
    "compare_packed",
    "decode_fp8",
    "decode_mxfp4",
    "dequantize_nested_into",
    "dequantize_nf4",
    "dequantize_nf4_into",
    "digest_tensors",
    "exchange",
    "fingerprint",
    "largest_values",
    "measure",
    "merge",
    "merge_nf4_into",
    "nested_quant_map",
    "pack",
    "plan_merge",
    "plan_pack",
    "quantize_nested",
    "quantize_nf4",
    "quantize_nf4_best",
    "quantize_nf4_into",
    "read_header",
    "read_index",
    "read_packed",
    "weight_statistics",
]

# numpy's arrays say that they are buffers from Python 3.12 on.
_Buffer: TypeAlias = Buffer | NDArray[Any]

__version__: str

ISA: str
"""The vector instructions in use: portable, avx2 or avx512; held down by the environment variable QPACK_ISA."""

BLOCKSIZES: tuple[int, ...]
"""Weights per block scale that bitsandbytes accepts."""

LEVELS: tuple[float, ...]
"""The 16 values that NF4 has for a weight over its block's scale, ascending."""

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
    @property
    def resumed_bytes(self) -> int:
        """Source bytes whose outputs an interrupted run had written."""

    @property
    def digests(self) -> dict[str, str]:
        """``DTYPE SHAPE DIGEST`` of every stored tensor by name, the digest being BLAKE3 of its bytes."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def source_fingerprint(self) -> str: ...
    @property
    def errors(self) -> dict[str, tuple[float, float, float, int]]:
        """Of every packed weight: relative error, norm, the worst block's relative error, and that block's index."""

    @property
    def changes(self) -> dict[str, tuple[float, float]]:
        """Frobenius norms of the change and of the weight before, of every weight that was changed, not replaced."""

def read_header(path: str | PathLike[str]) -> list[TensorInfo]:
    """Validate a safetensors file's header and list its tensors in the order of their bytes."""

def read_index(path: str | PathLike[str]) -> dict[str, str]:
    """The file of every tensor, by an index's ``weight_map``; all of them are plain names."""

def read_packed(shards: Sequence[str | PathLike[str]]) -> list[PackedInfo]:
    """List the packed weights of these files, each checked to be complete."""

def largest_values(path: str | PathLike[str]) -> dict[str, float]:
    """The largest magnitude in every tensor of F32, F16 or BF16 of this file, by name.

    Raises `CheckpointError`, naming tensor and flat index, at a value that is NaN or infinite.
    """

def digest_tensors(
    paths: Sequence[str | PathLike[str]],
    *,
    names: set[str] | None = None,
    threads: int = 0,
    on_progress: Callable[[int, int], object] | None = None,
) -> list[tuple[Path, str, str]]:
    """File, name and BLAKE3 (in hexadecimal, of the bytes as stored) of every tensor of these safetensors files.

    With ``names`` only of those.
    """

def fingerprint(tensors: Sequence[tuple[str, str, Sequence[int], str]]) -> str:
    """The fingerprint of tensors given by name, dtype, shape and digest, in any order (see `qpack.manifest`)."""

def broken_weights(paths: Sequence[str | PathLike[str]]) -> list[tuple[str, Path, str]]:
    """Weight, file and reason of every packed weight of these files that is incomplete or not as its state says."""

@final
class Comparison:
    """How far stored tensors are from what they were made from."""

    @property
    def errors(self) -> dict[str, tuple[float, float, float, int]]:
        """Of every packed weight, as in `Written`."""

    @property
    def differences(self) -> dict[str, int]:
        """Of kept tensors that are not their source, rounded once to the stored dtype: the first flat index."""

    @property
    def problems(self) -> dict[str, str]:
        """Why tensors cannot be compared: missing, of other shapes or types, a source that is not finite."""

    @property
    def source_fingerprint(self) -> str: ...

def compare_packed(
    paths: Sequence[str | PathLike[str]],
    sources: Sequence[str | PathLike[str]],
    recipes: Sequence[Recipe],
    *,
    threads: int = 0,
    on_progress: Callable[[int, int], object] | None = None,
) -> Comparison:
    """Compare the tensors of the files ``paths`` with what ``recipes`` make of those of ``sources``."""

@final
class WeightStatistics:
    """How often a packed weight has each of the 16 codes, and its block scales as decoded."""

    @property
    def codes(self) -> list[int]: ...
    @property
    def smallest(self) -> float: ...
    @property
    def mean(self) -> float: ...
    @property
    def largest(self) -> float: ...
    @property
    def negative(self) -> int: ...

def weight_statistics(paths: Sequence[str | PathLike[str]], name: str) -> WeightStatistics:
    """Go through the codes and scales of one packed weight."""

class _Source(Protocol):
    """Where shards come from that are not there yet: `qpack.sources.Source`."""

    def fetch(self, shard: Path, /) -> Path: ...
    def drop(self, shard: Path, /) -> None: ...

def pack(
    shards: Sequence[str | PathLike[str]],
    directory: str | PathLike[str],
    recipes: Sequence[Recipe],
    *,
    mode: str,
    quant_storage: str,
    inputs: str,
    max_shard_bytes: int,
    threads: int,
    source: _Source | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> Written:
    """Write to ``directory`` what ``recipes`` make of the tensors of ``shards``; ``threads=0`` takes all cores.

    Goes on where an interrupted call with the same arguments ended. ``inputs`` is any text that changes when the source
    or an option does. With a ``source`` each shard is read where `fetch` puts it, and dropped when it is done with.
    """

def measure(
    shards: Sequence[str | PathLike[str]],
    recipes: Sequence[Recipe],
    candidates: Sequence[Packing],
    *,
    threads: int,
    source: _Source | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> dict[str, list[float]]:
    """The squared error that each packed weight would have under each of ``candidates``, by name; writes nothing."""

def plan_pack(
    shards: Sequence[str | PathLike[str]],
    recipes: Sequence[Recipe],
    *,
    quant_storage: str,
    max_shard_bytes: int,
) -> list[tuple[str, int]]:
    """The files that `pack` would write, in order, each with its size in bytes."""

def exchange(one: str | PathLike[str], other: str | PathLike[str]) -> None:
    """Let two directories change names, at once. `OSError` where the file system cannot do it."""

def merge(
    shards: Sequence[str | PathLike[str]],
    directory: str | PathLike[str],
    recipes: Sequence[Recipe],
    changes: Mapping[str, AnyChange],
    *,
    mode: str,
    quant_storage: str,
    inputs: str,
    max_shard_bytes: int,
    threads: int,
    source: _Source | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> Written:
    """As `pack`, of tensors that were changed: a source by the name that ``changes`` has, before it is cut into parts.

    A recipe's source may itself be a packed weight, which is then unpacked: its one part is all of it (or of its
    transpose) in a float type, that of its quant state by default. What stands beside such a weight is in no recipe.
    The source of a `Replace` need not be in ``shards``.

    Every value is the sum in f64 of the decoded f32 weight and the change, rounded once to the type that it is kept
    in. A packed part is quantized from the sum rounded to f32, and its error is that against this sum.
    """

def plan_merge(
    shards: Sequence[str | PathLike[str]],
    recipes: Sequence[Recipe],
    changes: Mapping[str, AnyChange],
    *,
    quant_storage: str,
    max_shard_bytes: int,
) -> list[tuple[str, int]]:
    """The files that `merge` would write, in order, each with its size in bytes; refuses what `merge` refuses."""

def quantize_nf4(weights: bytes, dtype: str, blocksize: int) -> tuple[bytes, bytes]:
    """Codes (half a byte a weight) and absmax (f32 per block) of little-endian ``weights``."""

def quantize_nf4_best(
    weights: bytes, dtype: str, blocksize: int, double_quant: bool
) -> tuple[bytes, bytes, bytes, bytes, float]:
    """NF4 of least squared error: codes, and block scales (f32, of either sign), then two empty strings and 0.

    With double quantization: codes, nested codes of the scales (U8), nested_absmax, nested_quant_map (f32) and offset.
    """

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

def merge_nf4_into(
    codes: _Buffer,
    absmax: _Buffer,
    blocksize: int,
    left: _Buffer,
    right: _Buffer,
    r: int,
    scale: float,
    dtype: str,
    weights: _Buffer,
) -> None:
    """The weight that ``codes`` and ``absmax`` stand for, plus ``scale * left @ right``, in memory of the caller's.

    ``left`` (rows, r) and ``right`` (r, columns) are f32. ``weights`` takes rows * columns values of ``dtype`` as a
    buffer of bytes: the sums in f64, rounded once. Refusals are those of `quantize_nf4_into`.
    """

def quantize_nested(absmax: bytes, offset: float | None = None) -> tuple[bytes, bytes, float]:
    """Codes, second-level absmax (f32) and offset of block scales (f32); the offset defaults to their mean."""

def dequantize_nested_into(codes: _Buffer, absmax: _Buffer, quant_map: _Buffer, offset: float, scales: _Buffer) -> None:
    """The block scales (f32) that nested codes stand for, into ``scales``: ``quant_map[code] * absmax + offset``.

    ``codes`` is bytes, one a scale; ``absmax`` (f32) one per 256 of them; ``quant_map`` the 256 levels (f32).
    Refusals are those of `quantize_nf4_into`.
    """

def nested_quant_map() -> bytes:
    """The 256 levels (f32) that block scales are quantized to."""

def decode_fp8(
    codes: bytes, scales: bytes, scale_dtype: str, shape: Sequence[int], block: tuple[int, int] | None
) -> bytes:
    """The bfloat16 weight that E4M3 ``codes`` of ``shape`` (.., out_features, in_features) stand for.

    ``scales`` are one per ``block`` of rows and columns (None: one in all), by rows and columns of blocks, cut-off ones
    included; ``scale_dtype`` is their safetensors name: F32, BF16, F16, F8_E8M0 or U8 (exponents, as F8_E8M0).
    """

def decode_mxfp4(blocks: bytes, scales: bytes) -> bytes:
    """The bfloat16 weights that E2M1 ``blocks`` of 16 bytes stand for, 32 a block, each with its E8M0 scale."""
