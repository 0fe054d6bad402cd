"""The NF4 arithmetic beside bitsandbytes, one thread each, on one weight of 4096 x 11008.

python -m pytest benches/test_nf4.py

qpack writes to memory that is there already. bitsandbytes allocates its outputs on a CPU, whose first touch costs much
of a fast kernel's time; so qpack dequantizes to fresh memory too.
"""

from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qpack import _core

BLOCKSIZE = 64
SHAPE = (4096, 11008)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GAUSSIAN = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_bytes(tensor: torch.Tensor) -> U8:
    array: U8 = tensor.view(torch.uint8).numpy().reshape(-1)
    return array


def quantized(weight: torch.Tensor, name: str) -> tuple[U8, F32]:
    codes, absmax = np.empty(weight.numel() // 2, np.uint8), np.empty(weight.numel() // BLOCKSIZE, np.float32)
    _core.quantize_nf4_into(in_bytes(weight), name, BLOCKSIZE, codes, absmax)
    return codes, absmax


@pytest.mark.benchmark(group="quantize")
@pytest.mark.parametrize("name", DTYPES)
def test_quantize_qpack(benchmark: Any, name: str) -> None:
    weight = GAUSSIAN.to(DTYPES[name])
    codes, absmax = quantized(weight, name)
    arguments = (in_bytes(weight), name, BLOCKSIZE, codes, absmax)
    benchmark.pedantic(_core.quantize_nf4_into, arguments, rounds=50, warmup_rounds=5)


@pytest.mark.benchmark(group="quantize")
@pytest.mark.parametrize("name", DTYPES)
def test_quantize_bitsandbytes(benchmark: Any, name: str) -> None:
    weight = GAUSSIAN.to(DTYPES[name])
    benchmark.pedantic(bnb.quantize_4bit, (weight,), {"blocksize": BLOCKSIZE, "quant_type": "nf4"}, rounds=3)


@pytest.mark.benchmark(group="dequantize")
@pytest.mark.parametrize("name", DTYPES)
def test_dequantize_qpack(benchmark: Any, name: str) -> None:
    weight = GAUSSIAN.to(DTYPES[name])
    arguments = (*quantized(weight, name), name, BLOCKSIZE, in_bytes(torch.empty_like(weight)))
    benchmark.pedantic(_core.dequantize_nf4_into, arguments, rounds=50, warmup_rounds=5)


@pytest.mark.benchmark(group="dequantize")
@pytest.mark.parametrize("name", DTYPES)
def test_dequantize_qpack_to_fresh_memory(benchmark: Any, name: str) -> None:
    weight = GAUSSIAN.to(DTYPES[name])
    codes, absmax = quantized(weight, name)

    def dequantize() -> torch.Tensor:
        out = torch.empty_like(weight)
        _core.dequantize_nf4_into(codes, absmax, name, BLOCKSIZE, in_bytes(out))
        return out

    assert torch.isclose(dequantize(), weight, atol=0.02).all()
    benchmark.pedantic(dequantize, rounds=20, warmup_rounds=2)


@pytest.mark.benchmark(group="dequantize")
@pytest.mark.parametrize("scales", ["plain", "nested"])
@pytest.mark.parametrize("name", DTYPES)
def test_dequantize_bitsandbytes(benchmark: Any, name: str, scales: str) -> None:
    weight = GAUSSIAN.to(DTYPES[name])
    nested = scales == "nested"
    codes, state = bnb.quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=nested)
    benchmark.pedantic(bnb.dequantize_4bit, (codes, state), rounds=20, warmup_rounds=2)
