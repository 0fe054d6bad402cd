"""`best` mode's arithmetic: less error than bitsandbytes, decoded by bitsandbytes itself, and a plain numpy oracle."""

from typing import NamedTuple

import bitsandbytes.functional as bnb
import numpy as np
import oracle
import pytest
import torch
from bitsandbytes.autograd._functions import matmul_4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from qpack import _core

F64 = NDArray[np.float64]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

RATIOS = [0.86, 0.9, 0.94, 0.98, 1.02, 1.06, 1.3, 1.4]


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def floats(raw: bytes) -> oracle.F32:
    return np.frombuffer(raw, np.float32)


class Best(NamedTuple):
    """A packed weight with its scales as a reader decodes them."""

    codes: bytes
    scales: oracle.F32
    state: bnb.QuantState

    def decoded(self, dtype: str = "float32") -> bytes:
        elements, blocksize = self.state.shape.numel(), self.state.blocksize
        return _core.dequantize_nf4(self.codes, self.scales.tobytes(), elements, dtype, blocksize)


def best(weights: torch.Tensor, blocksize: int = 64, *, double_quant: bool) -> Best:
    name = str(weights.dtype).removeprefix("torch.")
    codes, absmax, nested_absmax, levels, offset = _core.quantize_nf4_best(
        to_bytes(weights), name, blocksize, double_quant
    )
    state = bnb.QuantState(
        absmax=torch.frombuffer(bytearray(absmax), dtype=torch.uint8 if double_quant else torch.float32),
        shape=weights.shape,
        code=torch.from_numpy(oracle.LEVELS),
        blocksize=blocksize,
        quant_type="nf4",
        dtype=weights.dtype,
    )
    if not double_quant:
        assert (nested_absmax, levels, offset) == (b"", b"", 0.0)
        return Best(codes, floats(absmax), state)
    state.nested = True
    state.offset = torch.tensor(offset)
    state.state2 = bnb.QuantState(
        absmax=torch.from_numpy(floats(nested_absmax).copy()),
        code=torch.from_numpy(floats(levels).copy()),
        blocksize=256,
        dtype=torch.float32,
    )
    nested = np.frombuffer(absmax, np.uint8)
    per_scale = np.repeat(floats(nested_absmax), 256)[: len(nested)]
    return Best(codes, floats(levels)[nested] * per_scale + np.float32(offset), state)


def mean_squared_error(weights: torch.Tensor, decoded: bytes) -> float:
    difference = weights.float().reshape(-1) - torch.frombuffer(bytearray(decoded), dtype=torch.float32)
    return difference.double().square().mean().item()


def bitsandbytes_error(weights: torch.Tensor, blocksize: int, *, double_quant: bool) -> float:
    packed, state = bnb.quantize_4bit(weights, blocksize=blocksize, quant_type="nf4", compress_statistics=double_quant)
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if double_quant else state.absmax
    decoded = _core.dequantize_nf4(to_bytes(packed), to_bytes(absmax), weights.numel(), "float32", blocksize)
    return mean_squared_error(weights, decoded)


def drawn(name: str, *shape: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    draw = {"gaussian": torch.distributions.Normal(0.0, 1.0), "student-t5": torch.distributions.StudentT(5.0)}
    return (draw[name].sample(shape) * 0.02).to(torch.bfloat16)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize(("name", "goal"), [("gaussian", 0.18), ("student-t5", 0.14)])
def test_less_error_than_bitsandbytes(name: str, goal: float, double_quant: bool) -> None:
    weights = drawn(name, 4096, 4096)
    found = mean_squared_error(weights, best(weights, double_quant=double_quant).decoded())
    gain = 1 - found / bitsandbytes_error(weights, 64, double_quant=double_quant)
    print(f"{name}, {double_quant=}: {gain:.4f}")
    assert gain >= goal


@pytest.mark.parametrize("blocksize", _core.BLOCKSIZES)
def test_less_error_at_every_blocksize(blocksize: int) -> None:
    weights = drawn("gaussian", 512, 4096)
    for double_quant in (False, True):
        found = mean_squared_error(weights, best(weights, blocksize, double_quant=double_quant).decoded())
        # The longer a block, the less its scale can do for it: 3 % at 4096.
        goal = 0.18 if blocksize <= 64 else 0.02
        assert found <= (1 - goal) * bitsandbytes_error(weights, blocksize, double_quant=double_quant)


def test_rows_of_different_size_keep_their_gain() -> None:
    """A map of the scales themselves, rather than of their ratio to the largest of 256, would lose 0.5 %."""
    weights = drawn("gaussian", 1024, 4096) * torch.exp(torch.randn(1024, 1) * 0.5).to(torch.bfloat16)
    found, free = (
        mean_squared_error(weights, best(weights, double_quant=double).decoded()) for double in (True, False)
    )
    assert found <= 1.003 * free


def test_scales_unlike_those_that_levels_were_fitted_to_keep_their_gain() -> None:
    """Levels are fitted to the first 131,072 scales: here those of equal rows, before rows of different size."""
    weights = drawn("gaussian", 2560, 4096)
    weights[2048:] *= torch.exp(torch.randn(512, 1)).to(torch.bfloat16)
    found, free = (
        mean_squared_error(weights[2048:], best(weights, double_quant=double).decoded()[2048 * 4096 * 4 :])
        for double in (True, False)
    )
    assert found <= 1.01 * free  # 1.20 without the share of the unseen


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_decodes_the_same_values(dtype: str, double_quant: bool) -> None:
    weights = drawn("gaussian", 96, 256).to(DTYPES[dtype])
    weights[3] = 0
    packed = best(weights, double_quant=double_quant)
    assert (packed.scales < 0).any()
    codes = torch.frombuffer(bytearray(packed.codes), dtype=torch.uint8).reshape(-1, 1)
    decoded = bnb.dequantize_4bit(codes, packed.state)
    assert to_bytes(decoded) == packed.decoded(dtype)
    assert not decoded[3].any()


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_bitsandbytes_multiplies_right(double_quant: bool) -> None:
    weights = drawn("student-t5", 192, 320).float()
    packed = best(weights, double_quant=double_quant)
    inputs = torch.randn(5, 320)
    expected = inputs @ torch.frombuffer(bytearray(packed.decoded()), dtype=torch.float32).reshape(192, 320).T
    codes = torch.frombuffer(bytearray(packed.codes), dtype=torch.uint8).reshape(-1, 1)
    for rows in (inputs, inputs[:1]):
        product = matmul_4bit(rows, codes.t(), quant_state=packed.state)
        # f32 sums of 320 products in another order.
        torch.testing.assert_close(product, expected[: len(rows)], rtol=1e-5, atol=1e-5)


def nearest_levels(scaled: F64) -> F64:
    midpoints = (oracle.LEVELS[:-1] + oracle.LEVELS[1:]) / np.float32(2)
    return oracle.LEVELS.astype(np.float64)[np.searchsorted(midpoints.astype(np.float64), scaled)]


def block_errors(blocks: F64, scales: F64) -> F64:
    levels = nearest_levels(blocks / scales[:, None])
    errors: F64 = np.square(blocks - levels * scales[:, None]).sum(1)
    return errors


def test_scales_are_near_the_best_of_all() -> None:
    """Against every ratio from 0.7 to 1.5 of both signs in steps of 0.0025: within 1 % of the least error in all."""
    for name in ("gaussian", "student-t5"):
        weights = drawn(name, 64, 512, seed=1)
        blocks = weights.double().reshape(-1, 64).numpy()
        absmax = np.abs(blocks).max(1)
        least = np.full(len(blocks), np.inf)
        for ratio in np.arange(0.7, 1.5, 0.0025):
            for sign in (1, -1):
                least = np.minimum(least, block_errors(blocks, sign * ratio * absmax))
        found = block_errors(blocks, best(weights, double_quant=False).scales.astype(np.float64))
        assert found.sum() <= 1.01 * least.sum()


def searched(blocks: F64) -> F64:
    """The search as its description says, in f64: rank on a grid of 118 steps, improve the best."""
    absmax = np.abs(blocks).max(1)
    values = blocks / absmax[:, None]
    grid = np.rint(values * 118)
    candidates = np.array([sign * ratio for ratio in RATIOS for sign in (1, -1)])
    errors = []
    for candidate in candidates:
        levels = np.minimum(np.rint(np.abs(oracle.LEVELS) * abs(candidate) * 118), 127) * np.sign(oracle.LEVELS)
        distances = np.abs(grid[..., None] * np.sign(candidate) - levels).min(-1)
        errors.append(np.square(distances).sum(1))
    best = candidates[np.argmin(errors, axis=0)]
    levels = nearest_levels(values / best[:, None])
    product, square = (values * levels).sum(1), np.square(levels).sum(1)
    squares = np.square(values).sum(1)
    better = squares - product**2 / square + 1e-5 * squares < block_errors(values, np.ones(len(values)))
    scales: F64 = np.where(better, product / square, 1.0) * absmax
    return scales


@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_scales_are_the_oracle_s(blocksize: int) -> None:
    weights = drawn("gaussian", 64, 1024, seed=2)
    expected = searched(weights.double().reshape(-1, blocksize).numpy())
    found = best(weights, blocksize, double_quant=False).scales
    same = np.abs(found - expected) <= 1e-5 * np.abs(expected)
    # Values within f32's rounding of a threshold, and equal ranks, may fall either way.
    assert same.mean() >= 0.998


def test_a_snapped_scale_is_the_level_nearest_to_the_free_one() -> None:
    weights = drawn("gaussian", 64, 4096, seed=3)
    packed, free = best(weights, double_quant=True), best(weights, double_quant=False).scales
    nested = packed.state.state2
    levels = nested.code.numpy()
    assert (np.diff(levels) >= 0).all()
    assert (nested.absmax.numpy() == np.abs(free).reshape(-1, 256).max(1)).all()
    ratio = (free.reshape(-1, 256) / nested.absmax.numpy()[:, None]).reshape(-1)
    codes = packed.state.absmax.numpy()
    distance = np.abs(levels[codes] - ratio)
    assert (distance <= np.abs(levels[:, None] - ratio).min(0) + 1e-7).all()
    # Codes are nearest under it.
    blocks = weights.float().reshape(-1, 64).numpy()
    unpacked = np.frombuffer(packed.codes, np.uint8)
    unpacked = np.stack([unpacked >> 4, unpacked & 15], axis=1).reshape(blocks.shape)
    expected = nearest_levels((blocks * (1 / packed.scales)[:, None]).astype(np.float64))
    assert (oracle.LEVELS[unpacked] == expected.astype(np.float32)).all()


@settings(deadline=None, max_examples=300)
@given(
    values=hnp.arrays(
        np.float32,
        st.integers(1, 400),
        elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)
        | st.floats(-1, 1, width=16, allow_subnormal=False),
    ),
    blocksize=st.sampled_from(_core.BLOCKSIZES),
)
def test_never_worse_than_exact(values: oracle.F32, blocksize: int) -> None:
    def errors(codes: bytes, scales: bytes) -> F64:
        decoded = _core.dequantize_nf4(codes, scales, len(values), "float32", blocksize)
        squares = np.square(values.astype(np.float64) - floats(decoded))
        return np.add.reduceat(squares, np.arange(0, len(values), blocksize))

    exact_codes, absmax = _core.quantize_nf4(values.tobytes(), "float32", blocksize)
    codes, scales, *_ = _core.quantize_nf4_best(values.tobytes(), "float32", blocksize, False)
    # 1e-13 of the largest square covers the rounding of products in f32.
    slack = 1e-13 * np.square(floats(absmax).astype(np.float64)) * blocksize
    assert (errors(codes, scales) <= errors(exact_codes, absmax) + slack).all()

    nested, nested_absmax, offset = _core.quantize_nested(absmax)
    stock = floats(_core.nested_quant_map())
    decoded = stock[np.frombuffer(nested, np.uint8)] * np.repeat(floats(nested_absmax), 256)[
        : len(nested)
    ] + np.float32(offset)
    exact = errors(exact_codes, decoded.tobytes()).sum()
    packed = best(torch.from_numpy(values.copy()), blocksize, double_quant=True)
    assert errors(packed.codes, packed.scales.tobytes()).sum() <= exact * (1 + 1e-9)


def test_what_was_packed_before_stays_as_it_was() -> None:
    codes, absmax = _core.quantize_nf4(to_bytes(drawn("gaussian", 64, 512)), "bfloat16", 64)
    values = _core.dequantize_nf4(codes, absmax, 64 * 512, "float32", 64)
    assert _core.quantize_nf4_best(values, "float32", 64, False)[:2] == (codes, absmax)


def test_a_block_of_zeros_decodes_to_zeros() -> None:
    weights = drawn("gaussian", 8, 64)
    weights[5] = 0
    for double_quant in (False, True):
        packed = best(weights, double_quant=double_quant)
        assert packed.codes[5 * 32 : 6 * 32] == b"\x77" * 32
        assert not floats(packed.decoded())[5 * 64 : 6 * 64].any()
    for length in (1, 63, 64, 65):
        packed = best(torch.zeros(length), double_quant=True)
        assert packed.codes == b"\x77" * -(-length // 2)
        assert not floats(packed.decoded()).any()


def test_bad_arguments_are_refused() -> None:
    weights = torch.ones(200)
    weights[130] = float("nan")
    with pytest.raises(ValueError, match="value 130 is not finite"):
        _core.quantize_nf4_best(to_bytes(weights), "float32", 64, True)
    with pytest.raises(ValueError, match="blocksize is 48, expected one of"):
        _core.quantize_nf4_best(bytes(4), "float32", 48, True)
    with pytest.raises(ValueError, match="3 bytes are no whole number of float32"):
        _core.quantize_nf4_best(bytes(3), "float32", 64, True)
