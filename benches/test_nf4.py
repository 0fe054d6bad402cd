"""The NF4 arithmetic beside bitsandbytes, one thread each, on one bf16 weight of 4096 x 1024.

python -m pytest benches
"""

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from qpack import _core

BLOCKSIZE = 64
WEIGHT = (torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.benchmark(group="quantize")
def test_quantize_qpack(benchmark: Any) -> None:
    raw = to_bytes(WEIGHT)
    benchmark(_core.quantize_nf4, raw, "bfloat16", BLOCKSIZE)


@pytest.mark.benchmark(group="quantize")
def test_quantize_bitsandbytes(benchmark: Any) -> None:
    benchmark(bnb.quantize_4bit, WEIGHT, blocksize=BLOCKSIZE, quant_type="nf4")


@pytest.mark.benchmark(group="dequantize")
def test_dequantize_qpack(benchmark: Any) -> None:
    codes, absmax = _core.quantize_nf4(to_bytes(WEIGHT), "bfloat16", BLOCKSIZE)
    benchmark(_core.dequantize_nf4, codes, absmax, WEIGHT.numel(), "bfloat16", BLOCKSIZE)


@pytest.mark.benchmark(group="dequantize")
def test_dequantize_bitsandbytes(benchmark: Any) -> None:
    codes, state = bnb.quantize_4bit(WEIGHT, blocksize=BLOCKSIZE, quant_type="nf4")
    benchmark(bnb.dequantize_4bit, codes, state)
