"""The arithmetic of packing against bitsandbytes on a CPU and against a plain numpy oracle."""

import os
import subprocess
import sys

import bitsandbytes.functional as bnb
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qpack import _core

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def adversarial(dtype: torch.dtype, blocksize: int) -> torch.Tensor:
    """Whole blocks of hard values, then an odd tail: zeros, ties, denormals, extremes, one spike."""
    finfo = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(blocksize)
    midpoints = torch.from_numpy((oracle.LEVELS[:-1] + oracle.LEVELS[1:]) / 2)
    neighbours = torch.cat([midpoints, torch.nextafter(midpoints, torch.tensor(2.0)), torch.from_numpy(oracle.LEVELS)])
    noise = torch.randn(64, blocksize, generator=generator)
    blocks = [
        torch.zeros(2, blocksize),
        torch.full((1, blocksize), -0.0),
        neighbours.repeat(blocksize // len(neighbours) + 1)[:blocksize].index_fill(0, torch.tensor([0]), 1.0)[None],
        noise,
        noise * finfo.smallest_normal,
        noise * finfo.smallest_normal * 2**-4,
        noise * finfo.tiny * 1e3,
        noise / noise.abs().max() * finfo.max,
        torch.zeros(1, blocksize).index_fill(1, torch.tensor([3]), finfo.max),
        torch.zeros(1, blocksize).index_fill(1, torch.tensor([3]), finfo.smallest_normal * finfo.eps),
        torch.randn(1, blocksize + 7, generator=generator),
    ]
    return torch.cat([block.reshape(-1) for block in blocks]).to(dtype)


def assert_as_bitsandbytes(weights: torch.Tensor, blocksize: int) -> None:
    name = str(weights.dtype).removeprefix("torch.")
    codes, absmax = _core.quantize_nf4(to_bytes(weights), name, blocksize)
    expected, state = bnb.quantize_4bit(weights, blocksize=blocksize, quant_type="nf4")
    assert np.array_equal(np.frombuffer(codes, np.uint8), expected.numpy().reshape(-1))
    assert absmax == to_bytes(state.absmax)


@pytest.mark.parametrize("blocksize", _core.BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_codes_and_absmax_are_bitsandbytes(dtype: torch.dtype, blocksize: int) -> None:
    weights = adversarial(dtype, blocksize)
    assert weights.isfinite().all()
    assert len(weights) % 2
    assert_as_bitsandbytes(weights, blocksize)
    for length in (1, 2, blocksize - 1, blocksize, blocksize + 1, 3 * blocksize):
        assert_as_bitsandbytes(weights[-length:], blocksize)


def test_every_bfloat16_against_every_absmax_mantissa() -> None:
    """All finite bf16 values that fit under each of the 128 mantissas of an absmax of exponent 0: 128 x 64k codes."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite() & (every.abs() <= 1)]
    for mantissa in range(128):
        top = torch.tensor(0x3F80 + mantissa, dtype=torch.int16).view(torch.bfloat16)
        blocks = torch.nn.functional.pad(every, (0, -len(every) % 63)).reshape(-1, 63)
        blocks = torch.cat([top.expand(len(blocks), 1), blocks], dim=1)
        assert_as_bitsandbytes(blocks.reshape(-1), 64)


@pytest.mark.parametrize("blocksize", _core.BLOCKSIZES)
def test_dequantized_values_are_the_oracle_s(blocksize: int) -> None:
    weights = adversarial(torch.float32, blocksize)
    codes, absmax = oracle.quantize(weights.numpy(), blocksize)
    expected = oracle.dequantize(codes, absmax, len(weights), blocksize)
    for name, dtype in DTYPES.items():
        out = _core.dequantize_nf4(codes.tobytes(), absmax.tobytes(), len(weights), name, blocksize)
        assert out == to_bytes(torch.from_numpy(expected).to(dtype))


def test_dequantized_values_are_bitsandbytes_on_shapes_that_it_gets_right() -> None:
    weights = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    packed, state = bnb.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    out = _core.dequantize_nf4(to_bytes(packed), to_bytes(state.absmax), weights.numel(), "bfloat16", 64)
    assert out == to_bytes(bnb.dequantize_4bit(packed, state))


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="without AVX2 torch.linspace rounds twice, and so does bitsandbytes' map",
)
def test_nested_map_is_bitsandbytes() -> None:
    assert _core.nested_quant_map() == to_bytes(bnb.create_dynamic_map())


def scales(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) ** 3 + 1e-3


@pytest.mark.parametrize("count", [1, 255, 256, 257, 100_000])
def test_nested_codes_are_bitsandbytes_given_the_same_offset(count: int) -> None:
    absmax = scales(count, seed=count)
    offset = absmax.mean()
    expected, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    codes, nested, used = _core.quantize_nested(to_bytes(absmax), offset.item())
    assert used == offset.item()
    assert codes == to_bytes(expected)
    assert nested == to_bytes(state.absmax)


def test_every_cell_of_the_nested_table_is_bitsandbytes() -> None:
    """Values at, just below and just above the edges of all 65,536 cells, in blocks whose scale is 1."""
    edges = (torch.arange(65537, dtype=torch.float64) - 0.5) / 65535 * 2 - 1
    edges = edges.clamp(-1, 1).float()
    up, down = torch.nextafter(edges, torch.tensor(2.0)), torch.nextafter(edges, torch.tensor(-2.0))
    values = torch.cat([edges, up, down]).clamp(-1, 1)
    values = torch.nn.functional.pad(values, (0, -len(values) % 255)).reshape(-1, 255)
    blocks = torch.cat([torch.ones(len(values), 1), values], dim=1).reshape(-1)
    expected, _ = bnb.quantize_blockwise(blocks, blocksize=256)
    codes, _, _ = _core.quantize_nested(to_bytes(blocks), 0.0)
    assert codes == to_bytes(expected)


def test_the_offset_is_the_mean_in_f64() -> None:
    absmax = scales(1_000_000, seed=1)
    _, _, offset = _core.quantize_nested(to_bytes(absmax))
    assert offset == absmax.double().mean().float().item()


@settings(deadline=None)
@given(
    values=hnp.arrays(
        np.float32, st.integers(1, 400), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    ),
    blocksize=st.sampled_from(_core.BLOCKSIZES),
)
def test_round_trip_of_anything_finite(values: oracle.F32, blocksize: int) -> None:
    codes, absmax = _core.quantize_nf4(values.tobytes(), "float32", blocksize)
    expected_codes, expected_absmax = oracle.quantize(values, blocksize)
    assert codes == expected_codes.tobytes()
    assert absmax == expected_absmax.tobytes()

    out = np.frombuffer(_core.dequantize_nf4(codes, absmax, len(values), "float32", blocksize), np.float32)
    # Half the widest gap between neighbouring levels, -1 and -0.696, is 0.152; 1e-6 covers the scale's own rounding.
    bound = np.repeat(expected_absmax, blocksize)[: len(values)].astype(np.float64) * (0.1520 + 1e-6)
    assert (np.abs(out.astype(np.float64) - values) <= np.maximum(bound, 1e-38)).all()
    # Packing what was unpacked changes nothing.
    assert _core.quantize_nf4(out.tobytes(), "float32", blocksize)[0] == codes or not out.any()


@settings(deadline=None)
@given(
    absmax=hnp.arrays(
        np.float32, st.integers(1, 700), elements=st.floats(0, 2.0**100, width=32, allow_subnormal=False)
    ),
)
def test_nested_codes_are_the_oracle_s(absmax: oracle.F32) -> None:
    codes, nested, offset = _core.quantize_nested(absmax.tobytes())
    levels = np.frombuffer(_core.nested_quant_map(), np.float32)
    expected_codes, expected_nested = oracle.quantize_nested(absmax, np.float32(offset), levels)
    assert nested == expected_nested.tobytes()
    assert codes == expected_codes.tobytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_refused(bad: float, dtype: str) -> None:
    weights = torch.ones(200, dtype=DTYPES[dtype])
    weights[130] = bad
    with pytest.raises(ValueError, match="value 130 is not finite"):
        _core.quantize_nf4(to_bytes(weights), dtype, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_buffers_of_the_caller_s_take_the_same_bytes(dtype: str) -> None:
    weights = adversarial(DTYPES[dtype], 64)
    expected_codes, expected_absmax = _core.quantize_nf4(to_bytes(weights), dtype, 64)
    codes, absmax = np.empty(len(expected_codes), np.uint8), np.empty(len(expected_absmax) // 4, np.float32)
    raw = weights.view(torch.uint8).numpy()
    _core.quantize_nf4_into(raw, dtype, 64, codes, absmax)
    assert (codes.tobytes(), absmax.tobytes()) == (expected_codes, expected_absmax)
    # At an odd address too.
    out = np.empty(len(raw) + 1, np.uint8)
    _core.dequantize_nf4_into(codes, absmax, dtype, 64, out[1:])
    assert out[1:].tobytes() == _core.dequantize_nf4(expected_codes, expected_absmax, len(weights), dtype, 64)
    _core.quantize_nf4_into(b"", dtype, 64, bytearray(), np.empty(0, np.float32))


def test_nested_scales_in_buffers_of_the_caller_s() -> None:
    absmax = torch.rand(700, generator=torch.Generator().manual_seed(0)) + 0.5
    blob, outer, offset = _core.quantize_nested(to_bytes(absmax))
    codes, quant_map = np.frombuffer(blob, np.uint8), np.frombuffer(_core.nested_quant_map(), np.float32)
    outer_scales, levels = (torch.from_numpy(np.copy(part)) for part in (np.frombuffer(outer, np.float32), quant_map))
    state = bnb.QuantState(outer_scales, code=levels, blocksize=256, dtype=torch.float32)
    expected = bnb.dequantize_blockwise(torch.from_numpy(codes.copy()), state) + offset
    scales = np.empty(700, np.float32)
    arguments = (codes, np.frombuffer(outer, np.float32), quant_map)
    _core.dequantize_nested_into(*arguments, offset, scales)
    assert scales.tobytes() == to_bytes(expected)
    with pytest.raises(ValueError, match="scales has 699 items, expected 700"):
        _core.dequantize_nested_into(*arguments, offset, scales[1:])
    with pytest.raises(ValueError, match="quant_map has 255 items, expected 256"):
        _core.dequantize_nested_into(codes, arguments[1], quant_map[1:], offset, scales)
    with pytest.raises(ValueError, match="2 second-level scales do not belong to 700 scales"):
        _core.dequantize_nested_into(codes, arguments[1][1:], quant_map, offset, scales)


def test_buffers_that_do_not_fit_are_refused() -> None:
    weights, codes, absmax = np.ones(256, np.uint8), np.empty(64, np.uint8), np.empty(2, np.float32)
    with pytest.raises(ValueError, match="codes has 63 items, expected 64"):
        _core.quantize_nf4_into(weights, "bfloat16", 64, codes[:63], absmax)
    with pytest.raises(ValueError, match="absmax has 1 items, expected 2"):
        _core.quantize_nf4_into(weights, "bfloat16", 64, codes, absmax[:1])
    with pytest.raises(ValueError, match="codes is read-only"):
        _core.quantize_nf4_into(weights, "bfloat16", 64, bytes(64), absmax)
    with pytest.raises(ValueError, match="weights is not contiguous"):
        _core.quantize_nf4_into(np.ones(512, np.uint8)[::2], "bfloat16", 64, codes, absmax)
    with pytest.raises(ValueError, match="weights and codes share memory"):
        _core.quantize_nf4_into(weights, "bfloat16", 64, weights[:64], absmax)
    with pytest.raises(ValueError, match="weights and absmax share memory"):
        _core.dequantize_nf4_into(codes, weights[:8].view(np.float32), "bfloat16", 64, weights)
    with pytest.raises(ValueError, match="64 bytes of codes and 1 scales do not make 128 weights"):
        _core.dequantize_nf4_into(codes, absmax[:1], "bfloat16", 64, weights)
    with pytest.raises(BufferError):
        _core.quantize_nf4_into(weights, "bfloat16", 64, codes, absmax.astype(np.float64))
    with pytest.raises(BufferError):
        # Not aligned for f32.
        _core.dequantize_nf4_into(codes, np.empty(9, np.uint8)[1:].view(np.float32), "bfloat16", 64, weights)


def test_illegal_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="blocksize is 48, expected one of"):
        _core.quantize_nf4(bytes(4), "float32", 48)
    with pytest.raises(ValueError, match="dtype is 'float64', expected"):
        _core.quantize_nf4(bytes(8), "float64", 64)
    with pytest.raises(ValueError, match="3 bytes are no whole number of float32"):
        _core.quantize_nf4(bytes(3), "float32", 64)
    with pytest.raises(ValueError, match="1 bytes of codes and 1 scales do not make 64 weights"):
        _core.dequantize_nf4(bytes(1), bytes(4), 64, "float32", 64)


def test_the_instructions_can_be_held_down() -> None:
    program = "from qpack import _core; print(_core.ISA)"
    command = [sys.executable, "-c", program]
    for isa in ("portable", _core.ISA):
        done = subprocess.run(command, env=os.environ | {"QPACK_ISA": isa}, capture_output=True, text=True, check=True)
        assert done.stdout == f"{isa}\n"
    done = subprocess.run(command, env=os.environ | {"QPACK_ISA": "mmx"}, capture_output=True, text=True, check=False)
    assert "QPACK_ISA is mmx, expected portable, avx2 or avx512" in done.stderr
