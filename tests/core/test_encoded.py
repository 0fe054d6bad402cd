"""Decoding FP8 and MXFP4 against transformers' own functions, bit for bit."""

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qpack import _core

SCALE_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
}


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def bfloat16(raw: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).reshape(shape)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Every bit, but for which NaN it is: torch's own differs between its scalar and its vector code."""
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0).view(torch.int16), expected.nan_to_num(0).view(torch.int16))


def random_scales(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Scales as of real weights, and over all of their type's range."""
    generator = torch.Generator().manual_seed(seed)
    if dtype in ("F8_E8M0", "U8"):
        raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return raw if dtype == "U8" else raw.view(torch.float8_e8m0fnu)
    scales = torch.rand(shape, generator=generator) * 1e-3
    scales.view(-1)[::3] *= 2.0 ** torch.randint(-130, 130, scales.view(-1)[::3].shape, generator=generator).float()
    return scales.to(SCALE_DTYPES[dtype])


@pytest.mark.parametrize("shape", [(512, 384), (2, 256, 128)])
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_fp8_is_what_transformers_makes_of_it(dtype: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)  # every code many times in a block
    scales = random_scales(dtype, (*shape[:-2], shape[-2] // 128, shape[-1] // 128))
    weight = codes.view(torch.float8_e4m3fn)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=torch.bfloat16)
    assert_same(
        bfloat16(_core.decode_fp8(to_bytes(codes), to_bytes(scales), dtype, shape, (128, 128)), shape), expected
    )


def test_fp8_codes_under_every_scale() -> None:
    """All 256 codes under every E8M0 scale, and under every bfloat16, which has all signs and exponents of f32."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(65536, 1)
    weight = codes.view(torch.float8_e4m3fn)
    exponents = torch.arange(256, dtype=torch.uint8)[:, None]
    values = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16)[:, None]
    cases = [("U8", exponents), ("F8_E8M0", exponents.view(torch.float8_e8m0fnu)), ("BF16", values)]
    for dtype, scales in cases:
        rows = len(scales)
        expected = Fp8Dequantize(None)._dequantize_one(weight[:rows], scales, output_dtype=torch.bfloat16)
        found = _core.decode_fp8(to_bytes(codes[:rows]), to_bytes(scales), dtype, (rows, 256), (1, 256))
        assert_same(bfloat16(found, (rows, 256)), expected)


@pytest.mark.parametrize("shape", [(576, 448), (130, 128), (1, 1), (2, 100, 300)])
def test_fp8_blocks_that_are_cut_off(shape: tuple[int, ...]) -> None:
    """As if the weight were padded to whole blocks, the only shapes that transformers decodes rightly."""
    *matrices, rows, columns = shape
    whole = (*matrices, -(-rows // 128) * 128, -(-columns // 128) * 128)
    codes = torch.randint(0, 256, whole, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    scales = random_scales("F32", (*matrices, whole[-2] // 128, whole[-1] // 128))
    weight = codes.view(torch.float8_e4m3fn)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=torch.bfloat16)[..., :rows, :columns]
    codes = codes[..., :rows, :columns]
    assert_same(
        bfloat16(_core.decode_fp8(to_bytes(codes), to_bytes(scales), "F32", shape, (128, 128)), shape), expected
    )


def test_fp8_with_one_scale() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    scale = torch.tensor(0.0123)
    expected = Fp8Dequantize(None)._dequantize_one(codes.view(torch.float8_e4m3fn), scale, output_dtype=torch.bfloat16)
    found = _core.decode_fp8(to_bytes(codes), to_bytes(scale), "F32", (4, 64), None)
    assert_same(bfloat16(found, (4, 64)), expected)


def test_fp8_nan_codes_are_not_finite() -> None:
    codes = bytes([0x7E, 0x7F, 0xFE, 0xFF])
    found = bfloat16(_core.decode_fp8(codes, to_bytes(torch.ones(1)), "F32", (1, 4), None), (4,))
    assert found.isfinite().tolist() == [True, False, True, False]
    assert found[[0, 2]].tolist() == [448.0, -448.0]


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    """Every byte at every place of a group, under every scale that is a number."""
    bytes_ = torch.arange(256, dtype=torch.uint8)
    blocks = torch.stack([bytes_.roll(shift) for shift in range(255)]).reshape(1, 255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8)[None, :, None].repeat(1, 1, 16)
    expected = convert_moe_packed_tensors(blocks, scales).transpose(1, 2)
    found = _core.decode_mxfp4(to_bytes(blocks), to_bytes(scales))
    assert_same(bfloat16(found, (1, 255, 512)), expected)

    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (4, 96, 5, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 130, (4, 96, 5), dtype=torch.uint8, generator=generator)
    expected = convert_moe_packed_tensors(blocks, scales).transpose(1, 2)
    found = _core.decode_mxfp4(to_bytes(blocks), to_bytes(scales))
    assert_same(bfloat16(found, (4, 96, 160)), expected)


def test_mxfp4_groups_whose_scale_is_nan_are_not_finite() -> None:
    found = bfloat16(_core.decode_mxfp4(bytes(range(32)), bytes([127, 255])), (2, 32))
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_sizes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="3 bytes are not 4 scales of U8"):
        _core.decode_fp8(bytes(256 * 130), bytes(3), "U8", (256, 130), (128, 128))
    with pytest.raises(ValueError, match="scales are I32, expected F32, BF16, F16, F8_E8M0 or U8"):
        _core.decode_fp8(bytes(4), bytes(4), "I32", (2, 2), None)
    with pytest.raises(ValueError, match="no dtype E8M0"):
        _core.decode_fp8(bytes(4), bytes(1), "E8M0", (2, 2), None)
    with pytest.raises(ValueError, match=r"5 bytes are no weight of shape \[2, 2\]"):
        _core.decode_fp8(bytes(5), bytes(4), "F32", (2, 2), None)
    with pytest.raises(ValueError, match=r"has shape \[4\], expected at least two dimensions"):
        _core.decode_fp8(bytes(4), bytes(4), "F32", (4,), (1, 1))
    with pytest.raises(ValueError, match="40 bytes of blocks do not belong to 2 scales"):
        _core.decode_mxfp4(bytes(40), bytes(2))
