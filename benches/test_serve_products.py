"""What `qpack serve` puts in the place of vLLM's on a CPU, beside vLLM's: the 4-bit layer and adapters' products.

    python -m pytest benches/test_serve_products.py --benchmark-timer=time.process_time

One thread, bfloat16. The layers of one block of SmolLM2-135M and of Llama-3-8B, fused as vLLM fuses them; 1, 16 and 256
tokens at once; 16 tokens of 1 and of 8 adapters of rank 16 in 8 slots.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from serve import linear_cpu

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports

# Columns, and rows of each part.
BLOCKS = {
    "135M": ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,))),
    "8B": ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))),
}
RANK, SLOTS, TOKENS = 16, 8, 16


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def packed(columns: int, rows: tuple[int, ...]) -> Any:
    """A layer with what the plugin's loader puts into one."""
    parts = [quantize_4bit(torch.randn(n, columns).to(torch.bfloat16), quant_type="nf4") for n in rows]
    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.cat([codes for codes, _ in parts]), requires_grad=False)
    layer.weight.bnb_quant_state = dict(enumerate(state for _, state in parts))
    layer.weight.bnb_shard_offsets = torch.tensor([0, *(len(codes) for codes, _ in parts)]).cumsum(0)
    return layer


@pytest.mark.parametrize("tokens", [1, 16, 256])
@pytest.mark.parametrize("size", BLOCKS)
@pytest.mark.parametrize("side", ["plugin", "qpack"])
def test_linear(side: str, size: str, tokens: int, benchmark: Any) -> None:
    from vllm_bnb_plugin.quantization.config import BitsAndBytesConfig  # type: ignore[import-untyped]
    from vllm_bnb_plugin.quantization.linear import BitsAndBytesLinearMethod  # type: ignore[import-untyped]

    benchmark.group = f"4-bit layers of a block, {size}, {tokens} tokens"
    apply = BitsAndBytesLinearMethod._apply_4bit_weight
    if side == "qpack":
        apply = linear_cpu.method(apply, linear_cpu.Scratch(torch.bfloat16))
    method = BitsAndBytesLinearMethod(BitsAndBytesConfig(load_in_4bit=True))
    layers = [(packed(*shape), torch.randn(tokens, shape[0]).to(torch.bfloat16)) for shape in BLOCKS[size]]
    benchmark.pedantic(lambda: [apply(method, layer, x, None) for layer, x in layers], rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("adapters", [1, 8])
@pytest.mark.parametrize("size", BLOCKS)
@pytest.mark.parametrize("side", ["vLLM", "qpack"])
def test_adapters(side: str, size: str, adapters: int, benchmark: Any) -> None:
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from serve.punica import Products

    benchmark.group = f"products of adapters in a block, {size}, {TOKENS} tokens, adapters: {adapters}"
    numbers = [*range(1, SLOTS + 1)]
    rows = tuple(numbers[row % adapters] for row in range(TOKENS))
    wrapper: Any = (PunicaWrapperCPU if side == "vLLM" else Products)(TOKENS, TOKENS, "cpu")
    wrapper.update_metadata(LoRAMapping(rows, rows), numbers, SLOTS + 1, 100)
    layers = []
    for columns, widths in BLOCKS[size]:
        a = tuple(torch.randn(SLOTS, 1, RANK, columns).to(torch.bfloat16) for _ in widths)
        b = tuple(torch.randn(SLOTS, 1, width, RANK).to(torch.bfloat16) for width in widths)
        x, y = torch.randn(TOKENS, columns).to(torch.bfloat16), torch.zeros(TOKENS, sum(widths)).to(torch.bfloat16)
        layers.append((y, x, a, b, 1.0, widths))
    benchmark.pedantic(lambda: [wrapper.add_lora_linear(*layer) for layer in layers], rounds=20, warmup_rounds=2)
