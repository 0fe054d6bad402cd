"""The bitsandbytes plugin's 4-bit layer on a CPU, its weight decoded by the Rust extension.

::

    y = x W^T + b        W (out_features, in_features): all parts of a fused layer, such as q, k and v, in one

The plugin multiplies by one part after the other and copies each product; for each it lets bitsandbytes decode the
part into memory that it asks for anew. Here a weight is decoded some rows at a time, of several parts where they are
small, into a piece of memory that all layers share, and multiplied while it is in the processor's cache. Decoded in
bfloat16 it is the plugin's to the bit, and so are answers but for the order of sums. Without bfloat16 instructions a
product in bfloat16 is emulated and slow; there all is computed in float32.

Left to the plugin: FP4, 8 bits, experts, and more than `_MOST_THREADS` threads: the extension decodes with one, some
fifteen times as fast as bitsandbytes with one, and bitsandbytes with all.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import linear

from qpack import _core
from qpack.training.compute import cpu_dtype

_MOST_THREADS = 16

# Decoded, of a weight: fits in a processor's cache, and is long enough that a product is not all calls.
_PIECE_BYTES = 2 << 20


class Scratch:
    """Memory for one piece of a decoded weight at a time, as large as the largest so far."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = str(dtype).removeprefix("torch.")
        self._grow(0)

    def _grow(self, elements: int) -> None:
        self._values = torch.empty(elements, dtype=self.dtype)
        self._bytes: NDArray[np.uint8] = self._values.view(torch.uint8).numpy()

    def take(self, elements: int) -> tuple[torch.Tensor, NDArray[np.uint8]]:
        """Return memory for so many values, and the same as bytes; what it held is gone."""
        if elements > len(self._values):
            self._grow(elements)
        return self._values[:elements], self._bytes[: elements * self.dtype.itemsize]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one part."""

    codes: NDArray[np.uint8]
    absmax: NDArray[np.float32]
    blocksize: int
    count: int


class Weight:
    """One layer's weight, from the plugin's parameter."""

    def __init__(self, parameter: Any, scratch: Scratch) -> None:
        """Take a parameter with the attributes that the plugin's loader gives it."""
        states = [parameter.bnb_quant_state[n] for n in range(len(parameter.bnb_quant_state))]
        codes = parameter.detach().view(-1).numpy()
        starts = parameter.bnb_shard_offsets.tolist()  # in bytes, of each part and of the end
        self._scratch = scratch
        self._columns = states[0].shape[1]
        self._pieces: list[list[_Rows]] = []
        most = max(_PIECE_BYTES // (self._columns * scratch.dtype.itemsize), 1)
        room = 0
        for state, (start, end) in zip(states, pairwise(starts), strict=True):
            for rows in _cut(codes[start:end], state, most):
                if rows.count > room:
                    self._pieces.append([])
                    room = most
                self._pieces[-1].append(rows)
                room -= rows.count
        self._rows = sum(state.shape[0] for state in states)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x W^T``, (.., out_features), in the dtype of the scratch memory."""
        x = x.to(self._scratch.dtype)
        if len(self._pieces) == 1:
            return linear(x, self._decode(self._pieces[0]))
        product = x.new_empty(*x.shape[:-1], self._rows)
        row = 0
        for piece in self._pieces:
            decoded = self._decode(piece)
            product[..., row : row + len(decoded)] = linear(x, decoded)
            row += len(decoded)
        return product

    def _decode(self, piece: list[_Rows]) -> torch.Tensor:
        """Decode to (rows, in_features); it holds until the next piece is decoded."""
        values, memory = self._scratch.take(sum(rows.count for rows in piece) * self._columns)
        begin = 0
        for rows in piece:
            end = begin + rows.count * self._columns * self._scratch.dtype.itemsize
            _core.dequantize_nf4_into(rows.codes, rows.absmax, self._scratch.name, rows.blocksize, memory[begin:end])
            begin = end
        return values.view(-1, self._columns)


def _cut(codes: NDArray[np.uint8], state: Any, most: int) -> Iterator[_Rows]:
    """Cut a part where a row ends with a block of its weights, into ``most`` rows each if it ends there so early."""
    absmax, blocksize, (count, columns) = state.absmax.numpy(), state.blocksize, state.shape
    together = blocksize // gcd(blocksize, columns)  # rows
    step = max(most // together * together, together)
    for row in range(0, count, step):
        end = min(row + step, count)
        blocks = slice(row * columns // blocksize, -(-end * columns // blocksize))
        yield _Rows(codes[row * columns // 2 : -(-end * columns // 2)], absmax[blocks], blocksize, end - row)


def can_decode(parameter: Any) -> bool:
    """Whether all parts of a parameter of the plugin's are NF4 with plain scales, as its loader leaves them."""
    states = parameter.bnb_quant_state.values()
    return all(state.quant_type == "nf4" and not state.nested and len(state.shape) == 2 for state in states)


def install() -> None:
    """Let the plugin's linear layers multiply so, in this process; do nothing a second time.

    Raises:
        RuntimeError: if the plugin is another one than that this was written for.
    """
    from vllm_bnb_plugin.quantization.linear import BitsAndBytesLinearMethod  # type: ignore[import-untyped]

    plugin: Any = BitsAndBytesLinearMethod
    theirs = getattr(plugin, "_apply_4bit_weight", None)
    if theirs is not None and theirs.__module__ == __name__:
        return
    if theirs is None or list(inspect.signature(theirs).parameters) != ["self", "layer", "x", "bias"]:
        raise RuntimeError("BitsAndBytesLinearMethod._apply_4bit_weight is not vllm-bnb-plugin 0.0.3's")
    plugin._apply_4bit_weight = method(theirs, Scratch(cpu_dtype()))


def method(theirs: Any, scratch: Scratch) -> Any:
    """Return what takes the place of the plugin's ``_apply_4bit_weight``; it asks that for what it leaves to it."""

    def _apply_4bit_weight(
        self: Any, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        parameter: Any = layer.weight
        if not hasattr(parameter, "qpack_weight"):
            parameter.qpack_weight = Weight(parameter, scratch) if can_decode(parameter) else None
        weight: Weight | None = parameter.qpack_weight
        if weight is None or torch.get_num_threads() > _MOST_THREADS:
            product: torch.Tensor = theirs(self, layer, x, bias)
            return product
        product = weight.multiply(x)
        if bias is not None:
            product += bias
        return product.to(x.dtype)

    return _apply_4bit_weight
