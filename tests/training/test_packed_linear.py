"""Layers decoded by the Rust extension compute what bitsandbytes' own do, and are bitsandbytes' own afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch.utils._python_dispatch import TorchDispatchMode

from qpack.training import TrainSettings
from qpack.training.compute import Compute
from qpack.training.loop import fit
from qpack.training.model import add_lora, load_base
from qpack.training.packed_linear import decoded_in_rust


class Bitsandbytes(TorchDispatchMode):
    """Notes which operators of bitsandbytes run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "bitsandbytes":
            self.operators.add(str(function))
        return function(*args, **(kwargs or {}))


def packed_layer(
    *, nested: bool = True, quant_type: str = "nf4", bias: bool = False, storage: torch.dtype = torch.uint8
) -> Any:
    """One of 98 to 130 features: the last block of weights is not full."""
    torch.manual_seed(0)
    layer: Any = Linear4bit(98, 130, bias, torch.bfloat16, nested, quant_type, storage)
    weight = torch.randn(130, 98).to(torch.bfloat16)
    layer.weight = Params4bit(
        weight, requires_grad=False, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    layer.requires_grad_(False)
    layer.support_avx512bf16_for_cpu = False  # as qpack.load sets it
    return layer.to("cpu")


def output_and_gradient(layer: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    layer.compute_dtype = dtype
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, 98, generator=generator).to(dtype).requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, torch.randn(y.shape, generator=generator).to(dtype))
    return [y.detach(), gradient]


@pytest.mark.parametrize(
    "kind",
    [{}, {"nested": False}, {"bias": True}, {"storage": torch.bfloat16}],
    ids=["nested", "plain scales", "bias", "stored as bfloat16"],
)
def test_in_16_bits_it_is_bitsandbytes_to_the_bit(kind: dict[str, Any]) -> None:
    layer = packed_layer(**kind)
    expected = output_and_gradient(layer, torch.bfloat16)
    with Bitsandbytes() as used, decoded_in_rust(layer):
        found = output_and_gradient(layer, torch.bfloat16)
    assert not used.operators
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    with Bitsandbytes() as used:
        output_and_gradient(layer, torch.bfloat16)
    assert used.operators  # its own again
    assert "forward" not in vars(layer)


def test_in_float32_the_gradient_is_of_the_weight_that_was_multiplied_with() -> None:
    layer = packed_layer()
    output, _ = output_and_gradient(layer, torch.float32)
    with decoded_in_rust(layer):
        found = output_and_gradient(layer, torch.float32)
    assert torch.equal(found[0], output)
    state = layer.weight.quant_state
    state.dtype = torch.float32
    weight = dequantize_4bit(layer.weight, state)
    generator = torch.Generator().manual_seed(1)
    torch.randn(2, 7, 98, generator=generator)
    assert torch.equal(found[1], torch.randn(2, 7, 130, generator=generator) @ weight)


def test_what_is_left_to_bitsandbytes() -> None:
    trained = packed_layer(bias=True)
    trained.bias.requires_grad_()
    for layer in (packed_layer(quant_type="fp4"), trained):
        with decoded_in_rust(layer):
            assert "forward" not in vars(layer)


def test_training_decodes_with_nothing_else(base: Path, tmp_path: Path) -> None:
    settings = TrainSettings(r=4, max_steps=1, batch_size=1, gradient_checkpointing=True)
    compute = Compute("cpu", torch.bfloat16)
    model = add_lora(load_base(base, compute), settings)
    example = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "origin": "data:1"}
    with Bitsandbytes() as used:
        fit(model, [example], settings, compute, directory=tmp_path / "checkpoints")
    assert not [name for name in used.operators if "dequantize" in name or "gem" in name]
    assert not [layer for layer in model.modules() if isinstance(layer, Linear4bit) and "forward" in vars(layer)]
