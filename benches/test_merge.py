"""Merging one packed weight of 4096 x 11008 at rank 16 to bfloat16 beside torch and PEFT, one thread each.

python -m pytest benches/test_merge.py

All take codes and factors in f32 and give ``round(dequantize(W) + scale * B @ A)``; torch decodes by bitsandbytes. With
sums in f32 and in bfloat16 it writes to fresh memory, as its functions do, and so does qpack; `warm` is qpack writing
to memory that is there, as it does while it merges files. PEFT merges a layer that was decoded to bfloat16.
"""

from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from peft.tuners.lora import Linear

from qpack import _core

BLOCKSIZE, R, SCALE = 64, 16, 2.0
SHAPE = (4096, 11008)
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = (torch.randn(SHAPE, generator=GENERATOR) * 0.02).bfloat16()
A, B = torch.randn(R, SHAPE[1], generator=GENERATOR) * 0.02, torch.randn(SHAPE[0], R, generator=GENERATOR) * 0.01
CODES, STATE = bnb.quantize_4bit(WEIGHT, blocksize=BLOCKSIZE, quant_type="nf4")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def merge_by_qpack(merged: torch.Tensor) -> torch.Tensor:
    codes: NDArray[np.uint8] = CODES.numpy().reshape(-1)
    out: NDArray[np.uint8] = merged.view(torch.uint8).numpy().reshape(-1)
    absmax, left, right = STATE.absmax.numpy(), B.numpy().reshape(-1), A.numpy().reshape(-1)
    _core.merge_nf4_into(codes, absmax, BLOCKSIZE, left, right, R, SCALE, "bfloat16", out)
    return merged


def merge_by_torch(dtype: torch.dtype) -> torch.Tensor:
    STATE.dtype = dtype
    weight = bnb.dequantize_4bit(CODES, STATE)
    return torch.addmm(weight, B.to(dtype), A.to(dtype), alpha=SCALE).to(torch.bfloat16)


@pytest.mark.benchmark(group="merge")
def test_merge_qpack_warm(benchmark: Any) -> None:
    benchmark.pedantic(merge_by_qpack, (torch.empty_like(WEIGHT),), rounds=30, warmup_rounds=3)


@pytest.mark.benchmark(group="merge")
def test_merge_qpack(benchmark: Any) -> None:
    merged = benchmark.pedantic(lambda: merge_by_qpack(torch.empty_like(WEIGHT)), rounds=20, warmup_rounds=2)
    # Another order of f32 sums: a value beside a tie may go the other way.
    assert (merged != merge_by_torch(torch.float32)).sum() < merged.numel() * 1e-3


@pytest.mark.benchmark(group="merge")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_torch(benchmark: Any, dtype: torch.dtype) -> None:
    benchmark.pedantic(merge_by_torch, (dtype,), rounds=10, warmup_rounds=1)


@pytest.mark.benchmark(group="merge")
def test_merge_peft(benchmark: Any) -> None:
    layer = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=torch.bfloat16)
    lora = Linear(layer, "default", LoraConfig(r=R, lora_alpha=int(SCALE * R)), r=R, lora_alpha=int(SCALE * R))
    lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data = A, B

    def merge() -> None:
        STATE.dtype = torch.bfloat16
        layer.weight.data = bnb.dequantize_4bit(CODES, STATE)
        lora.merge()
        lora.merged_adapters.clear()

    benchmark.pedantic(merge, rounds=5, warmup_rounds=1)
