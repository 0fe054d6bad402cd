"""Training steps in bf16 and in f32 on this processor, which is what `qpack.training.compute` chooses by, and packed
layers alone, decoded by bitsandbytes and by qpack: those of SmolLM2-135M and those of a Llama of 1B.

    python -m pytest benches/test_train.py

On a processor with AVX512-BF16 or AMX, one without them is imitated by this, which takes six minutes:

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python -m pytest benches/test_train.py
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qpack
from qpack.training import TrainSettings
from qpack.training.compute import Compute
from qpack.training.model import add_lora, load_base
from qpack.training.packed_linear import decoded_in_rust

SEQUENCES, LENGTH = 8, 64


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six of the thirty layers of SmolLM2-135M, with random weights, packed."""
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder / "source")
    qpack.convert(folder / "source", folder / "packed")
    return folder / "packed"


@pytest.mark.benchmark(group=f"train, {SEQUENCES} x {LENGTH} tokens")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_forward_and_backward(dtype: torch.dtype, base: Path, benchmark: Any) -> None:
    model = add_lora(load_base(base, Compute("cpu", dtype)), TrainSettings())
    ids = torch.randint(0, 49152, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize(("hidden", "inner"), [(576, 1536), (2048, 8192)], ids=["135M", "1B"])
@pytest.mark.parametrize("decoder", ["bitsandbytes", "qpack"])
def test_packed_layers(decoder: str, hidden: int, inner: int, benchmark: Any) -> None:
    """Forward and backward through the layers of a feed-forward part, with few tokens and so mostly decoding."""
    benchmark.group = f"packed layers, hidden size {hidden}, {LENGTH} tokens"
    layers: Any = nn.Sequential(*(_packed(*shape) for shape in ((hidden, inner), (inner, hidden)) * 2))
    x = torch.randn(LENGTH, hidden).to(torch.bfloat16).requires_grad_()
    with decoded_in_rust(layers) if decoder == "qpack" else nullcontext():
        benchmark.pedantic(lambda: layers(x).sum().backward(), rounds=10, warmup_rounds=2)


def _packed(inputs: int, outputs: int) -> Linear4bit:
    layer: Any = Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    weight = torch.randn(outputs, inputs).to(torch.bfloat16)
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
    packed: Linear4bit = layer.to("cpu")
    return packed
