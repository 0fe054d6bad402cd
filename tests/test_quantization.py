"""`qpack.quantize` and `qpack.dequantize` on arrays, against bitsandbytes and against what convert writes."""

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import load_file

import qpack

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def weight(dtype: torch.dtype = torch.float32, rows: int = 48) -> torch.Tensor:
    return torch.randn(rows, 128, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
def test_exact_is_bitsandbytes(dtype: torch.dtype, double_quant: bool) -> None:
    original = weight(dtype)
    packed = qpack.quantize(original, blocksize=32, double_quant=double_quant)
    codes, state = bnb.quantize_4bit(original, blocksize=32, quant_type="nf4")
    assert np.array_equal(packed.codes, codes.numpy().reshape(-1))
    assert (packed.shape, packed.dtype) == ((48, 128), str(dtype).removeprefix("torch."))
    if double_quant:
        centred = state.absmax - packed.nested_offset
        nested, nested_state = bnb.quantize_blockwise(centred, blocksize=256)
        assert np.array_equal(packed.absmax, nested.numpy())
        expected = bnb.dequantize_blockwise(nested, nested_state) + packed.nested_offset
        assert np.array_equal(packed.scales(), expected.numpy())
    else:
        assert np.array_equal(packed.scales(), state.absmax.numpy())
    for out in DTYPES:
        decoded = qpack.dequantize(packed, torch.empty(48, 128, dtype=out))
        values = oracle.dequantize(packed.codes, packed.scales(), original.numel(), 32).reshape(48, 128)
        assert torch.equal(decoded, torch.from_numpy(values).to(out))


@pytest.mark.parametrize("mode", ["exact", "best"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_numpy_and_torch_agree_and_bitsandbytes_reads_it(mode: str, double_quant: bool) -> None:
    original = weight()
    packed = qpack.quantize(original, mode=mode, double_quant=double_quant)
    same = qpack.quantize(original.numpy(), mode=mode, double_quant=double_quant)
    assert np.array_equal(packed.codes, same.codes)
    assert np.array_equal(packed.absmax, same.absmax)
    parts = {key.removeprefix("w."): torch.from_numpy(value.copy()) for key, value in packed.tensors("w").items()}
    state = bnb.QuantState.from_dict({key: value for key, value in parts.items() if key != "w"}, torch.device("cpu"))
    expected = bnb.dequantize_4bit(parts["w"], state)
    assert torch.equal(expected, qpack.dequantize(packed, torch.empty_like(original)))
    assert np.array_equal(expected.numpy(), qpack.dequantize(same, np.empty((48, 128), np.float32)))


def test_best_has_less_error_and_the_bits_are_those_of_the_format() -> None:
    original = weight(rows=512)
    exact, best = (qpack.quantize(original, mode=mode) for mode in ("exact", "best"))
    error = {
        packed: (qpack.dequantize(packed, torch.empty_like(original)) - original).square().mean().item()
        for packed in (exact, best)
    }
    assert error[best] < 0.85 * error[exact]
    assert exact.bits == best.bits == 4 + 8 / 64 + 32 / (64 * 256)
    assert qpack.quantize(original, double_quant=False).bits == 4.5


def test_convert_writes_the_same(llama: Path, packed: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    original = next(weights[name] for weights in map(load_file, llama.glob("*.safetensors")) if name in weights)
    parts = qpack.quantize(original).tensors(name)
    found = load_file(packed / "model.safetensors")
    for key, value in parts.items():
        if not key.endswith("__nf4"):  # which convert pads with spaces
            assert np.array_equal(found[key].numpy(), value), key


def test_what_cannot_be_quantized_is_refused() -> None:
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ([1.0], {}, TypeError, "list is neither a numpy array nor a torch tensor"),
        (np.ones(4), {}, TypeError, "dtype is float64, expected one of bfloat16, float16, float32"),
        (torch.ones(4, dtype=torch.int32), {}, TypeError, "dtype is int32"),
        (torch.ones(4, device="meta"), {}, TypeError, "tensor is on meta, expected cpu"),
        (weight().T, {}, ValueError, r"array of shape \(128, 48\) is not contiguous"),
        (np.ones((0, 4), np.float32), {}, ValueError, r"shape \(0, 4\), expected at least one element"),
        (weight(), {"mode": "worst"}, ValueError, "mode is 'worst', expected exact or best"),
        (weight(), {"blocksize": 48}, ValueError, "blocksize is 48, expected one of"),
        (weight(), {"blocksize": 0, "mode": "best"}, ValueError, "blocksize is 0, expected one of"),
        (np.array([1, np.nan], np.float32), {}, ValueError, "value 1 is not finite"),
        (np.array([1, np.inf], np.float32), {"mode": "best"}, ValueError, "value 1 is not finite"),
    ]
    for array, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            qpack.quantize(array, **options)
    packed = qpack.quantize(weight())
    with pytest.raises(ValueError, match=r"out has shape \(128, 48\), expected \(48, 128\)"):
        qpack.dequantize(packed, torch.empty(128, 48))
