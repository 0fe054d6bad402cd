"""NF4 on arrays in memory: `quantize` and `dequantize`, for numpy and for torch (on a CPU).

The same codes and scales as `qpack.convert` writes. Levels and scales: Dettmers et al., "QLoRA", arXiv 2305.14314;
layout and rounding: bitsandbytes 0.50, ``functional.quantize_4bit`` on a CPU, described in ``docs/convert.md``.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from qpack import _core

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    _Bytes: TypeAlias = NDArray[np.uint8]
    _Floats: TypeAlias = NDArray[np.float32]
    _Array = TypeVar("_Array", NDArray[Any], torch.Tensor)

_DTYPES = ("bfloat16", "float16", "float32")
_NESTED_BLOCKSIZE = 256


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight in NF4, as numpy arrays."""

    codes: "_Bytes"
    """[ceil(n / 2)]: two codes a byte, the even element in the high half."""
    absmax: "_Bytes | _Floats"
    """[ceil(n / blocksize)]: the block scales in f32, or with double quantization their 8-bit codes."""
    shape: tuple[int, ...]
    """Of the weight; n is the number of its elements."""
    dtype: str
    """Of the weight, by torch's name; numpy arrays are float16 or float32."""
    blocksize: int
    """Weights per block scale."""
    nested_absmax: "_Floats | None" = None
    """[ceil(blocks / 256)]: scales of the block scales; None without double quantization, as the next."""
    nested_quant_map: "_Floats | None" = None
    """[256]: levels of the block scales."""
    nested_offset: float = 0.0
    """What is added to every block scale."""

    @property
    def double_quant(self) -> bool:
        """Whether the block scales are in 8 bits."""
        return self.nested_absmax is not None

    @property
    def bits(self) -> float:
        """Bits a weight: codes and scales, without the levels."""
        size = self.codes.nbytes + self.absmax.nbytes
        size += 0 if self.nested_absmax is None else self.nested_absmax.nbytes
        return size * 8 / math.prod(self.shape)

    def scales(self) -> "_Floats":
        """The block scales in f32, [ceil(n / blocksize)], as every reader decodes them."""
        import numpy as np

        if self.nested_absmax is None or self.nested_quant_map is None:
            return cast("_Floats", self.absmax)
        nested = np.repeat(self.nested_absmax, _NESTED_BLOCKSIZE)[: len(self.absmax)]
        return self.nested_quant_map[self.absmax] * nested + np.float32(self.nested_offset)

    def tensors(self, name: str) -> "dict[str, NDArray[Any]]":
        """What bitsandbytes stores for the weight ``name``, ready for ``safetensors.numpy.save_file``."""
        import numpy as np

        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": self.blocksize, "dtype": self.dtype}
        state["shape"] = list(self.shape)
        tensors = {"": self.codes.reshape(-1, 1), ".absmax": self.absmax}
        tensors[".quant_map"] = np.array(_core.LEVELS, np.float32)
        if self.nested_absmax is not None and self.nested_quant_map is not None:
            tensors |= {".nested_absmax": self.nested_absmax, ".nested_quant_map": self.nested_quant_map}
            state |= {"nested_blocksize": _NESTED_BLOCKSIZE, "nested_dtype": "float32"}
            state["nested_offset"] = self.nested_offset
        tensors[".quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        return {name + suffix: array for suffix, array in tensors.items()}

    @classmethod
    def from_tensors(cls, name: str, tensors: "Mapping[str, NDArray[Any]]") -> "QuantizedWeight":
        """The weight ``name`` out of what `tensors` makes of it and bitsandbytes stores, the codes as bytes."""
        state = json.loads(tensors[name + _core.SUFFIXES[-1]].tobytes())
        return cls(
            tensors[name].reshape(-1),
            tensors[f"{name}.absmax"],
            tuple(state["shape"]),
            state["dtype"],
            state["blocksize"],
            tensors.get(f"{name}.nested_absmax"),
            tensors.get(f"{name}.nested_quant_map"),
            state.get("nested_offset", 0.0),
        )


def quantize(
    weight: "NDArray[Any] | torch.Tensor", *, blocksize: int = 64, double_quant: bool = True, mode: str = "exact"
) -> QuantizedWeight:
    """Quantize ``weight`` to NF4.

    ``weight`` is a contiguous array of any shape, float16 or float32 (torch: bfloat16 too). ``mode`` is ``exact``, the
    codes and scales of bitsandbytes on a CPU, or ``best``, the same format with less squared error.

    Raises:
        TypeError: if it is neither a numpy array nor a torch tensor on a CPU, or of another dtype.
        ValueError: if it is empty, not contiguous or not finite (naming the flat index), or an option is not legal.
    """
    import numpy as np

    raw, dtype = _bytes(weight)
    if mode not in ("exact", "best"):
        raise ValueError(f"mode is {mode!r}, expected exact or best")
    shape = tuple(weight.shape)
    elements = math.prod(shape)
    if elements == 0:
        raise ValueError(f"weight has shape {shape}, expected at least one element")
    if mode == "best":
        codes, absmax, nested_absmax, levels, offset = _core.quantize_nf4_best(
            raw.tobytes(), dtype, blocksize, double_quant
        )
        packed = np.frombuffer(codes, np.uint8)
        if not double_quant:
            return QuantizedWeight(packed, np.frombuffer(absmax, np.float32), shape, dtype, blocksize)
        nested = np.frombuffer(absmax, np.uint8)
    else:
        packed = np.empty(-(-elements // 2), np.uint8)
        scales = np.empty(-(-elements // blocksize) if blocksize > 0 else 0, np.float32)
        _core.quantize_nf4_into(raw, dtype, blocksize, packed, scales)
        if not double_quant:
            return QuantizedWeight(packed, scales, shape, dtype, blocksize)
        absmax, nested_absmax, offset = _core.quantize_nested(scales.tobytes())
        nested, levels = np.frombuffer(absmax, np.uint8), _core.nested_quant_map()
    return QuantizedWeight(
        packed,
        nested,
        shape,
        dtype,
        blocksize,
        np.frombuffer(nested_absmax, np.float32),
        np.frombuffer(levels, np.float32),
        offset,
    )


def dequantize(packed: QuantizedWeight, out: "_Array") -> "_Array":
    """Decode ``packed`` into ``out``, a contiguous array of its shape, and return it.

    ``out`` is a numpy array (float16, float32) or a torch tensor on a CPU (bfloat16 too), of any of these dtypes: each
    value is ``level * scale`` in f32, rounded once.

    Raises:
        TypeError, ValueError: as `quantize`, or if ``out`` has another shape.
    """
    raw, dtype = _bytes(out)
    if tuple(out.shape) != packed.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, expected {packed.shape}")
    _core.dequantize_nf4_into(packed.codes, packed.scales(), dtype, packed.blocksize, raw)
    return out


def _bytes(array: "NDArray[Any] | torch.Tensor") -> "tuple[_Bytes, str]":
    """The memory of ``array`` as bytes, not copied, and torch's name of its dtype."""
    import numpy as np

    if isinstance(array, np.ndarray):
        name = array.dtype.name
        contiguous = array.flags.c_contiguous
    elif type(array).__module__.partition(".")[0] == "torch":
        if array.device.type != "cpu":
            raise TypeError(f"tensor is on {array.device}, expected cpu")
        name = str(array.dtype).removeprefix("torch.")
        contiguous = array.is_contiguous()
    else:
        raise TypeError(f"{type(array).__name__} is neither a numpy array nor a torch tensor")
    if name not in _DTYPES:
        raise TypeError(f"dtype is {name}, expected one of {', '.join(_DTYPES)}")
    if not contiguous:
        raise ValueError(f"array of shape {tuple(array.shape)} is not contiguous")
    if isinstance(array, np.ndarray):
        return array.reshape(-1).view(np.uint8), name
    import torch

    return array.detach().reshape(-1).view(torch.uint8).numpy(), name
