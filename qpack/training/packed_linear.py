"""Packed linear layers on a CPU, their weights decoded by the Rust extension while a model is trained.

::

    y = x W^T + b        dx = dy W        W decoded in the dtype of x and dy, once for each product

bitsandbytes does the same with a decoder several times slower, into memory that it asks for anew each time. Here all
layers decode into one buffer: a product is done before the next weight is. In 16 bits results are bitsandbytes' to the
bit. In float32 its backward pass multiplies with weights rounded to the dtype that was packed; here it is the weight of
the forward pass.

Nothing is kept for the backward pass but the packed weight, as the layer has it when it computes: with FSDP it has just
been gathered. Afterwards the layers are bitsandbytes' own again.

Left to bitsandbytes: a GPU, FP4, a bias that is trained, and nested scales in other blocks than of 256.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from torch.nn.functional import linear

from qpack import _core


@contextmanager
def decoded_in_rust(model: nn.Module) -> Iterator[None]:
    """Let every packed layer of ``model`` that is on a CPU decode its weight so for the block."""
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit) and _can_decode(layer)]
    scratch = _Scratch()
    for layer in layers:
        cast(Any, layer).forward = partial(_forward, layer, _Decoder(_state(layer), scratch))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _state(layer: Linear4bit) -> QuantState:
    """How the weight is packed; where FSDP holds the weight, only the layer knows."""
    return cast(QuantState, getattr(layer.weight, "quant_state", None) or layer.quant_state)


def _can_decode(layer: Linear4bit) -> bool:
    state: Any = _state(layer)
    return (
        layer.weight.device.type == "cpu"
        and state.quant_type == "nf4"
        and (not state.nested or state.state2.blocksize == 256)
        and (layer.bias is None or not layer.bias.requires_grad)
    )


class _Scratch:
    """Memory that is asked for once, as large as the largest that is needed."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, purpose: str, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """``elements`` values, until the same is asked for again."""
        buffer = self._buffers.get((purpose, dtype))
        if buffer is None or len(buffer) < elements:
            buffer = self._buffers[purpose, dtype] = torch.empty(elements, dtype=dtype)
        return buffer[:elements]


class _Decoder:
    """The weight of one layer from its packed bytes."""

    def __init__(self, state: QuantState, scratch: _Scratch) -> None:
        packed: Any = state
        self.scratch = scratch
        self.shape, self.blocksize = packed.shape, packed.blocksize
        self.scales = packed.absmax.numpy()  # f32, or nested codes
        self.outer = None
        if packed.nested:
            self.outer = packed.state2.absmax.numpy(), packed.state2.code.numpy(), float(packed.offset)

    def __call__(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Decode ``weight`` to (out_features, in_features) in ``dtype``; it holds until the next one is decoded."""
        scales = self.scales
        if self.outer:
            scales = self.scratch.take("scales", len(self.scales), torch.float32).numpy()
            _core.dequantize_nested_into(self.scales, *self.outer, scales)
        decoded = self.scratch.take("weight", self.shape.numel(), dtype)
        codes = np.from_dlpack(weight.detach().view(torch.uint8).view(-1))  # numpy() would forbid FSDP to free it
        name = str(dtype).removeprefix("torch.")
        _core.dequantize_nf4_into(codes, scales, name, self.blocksize, decoded.view(torch.uint8).numpy())
        return decoded.view(self.shape)


class _Product(torch.autograd.Function):
    """``x W^T + b``, of which x alone has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, decode: _Decoder
    ) -> torch.Tensor:
        """Multiply (.., in_features) by the decoded weight."""
        ctx.weight, ctx.decode = weight, decode
        return linear(x, decode(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Multiply (.., out_features) by the weight, decoded again."""
        return gradients[0] @ ctx.decode(ctx.weight, gradients[0].dtype), None, None, None


def _forward(layer: Linear4bit, decode: _Decoder, x: torch.Tensor) -> torch.Tensor:
    """As `Linear4bit.forward`, in its compute dtype."""
    given = x.dtype
    x = x.to(layer.compute_dtype or given)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    product: torch.Tensor = _Product.apply(x, layer.weight, bias, decode)  # type: ignore[no-untyped-call]
    return product.to(given)
