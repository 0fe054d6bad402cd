"""The 4-bit layer on a CPU against the bitsandbytes plugin's own, which is called as vLLM calls it."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from serve import linear_cpu

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports

COLUMNS = 98  # the last block of a part is not full

# Rows of the parts.
LAYERS = {"one part": (130,), "q, k and v": (64, 32, 32), "gate and up": (96, 96)}


@pytest.fixture
def method() -> Iterator[Any]:
    """The plugin's class, as it is without us; put back at the end."""
    from vllm_bnb_plugin.quantization.linear import BitsAndBytesLinearMethod  # type: ignore[import-untyped]

    before = BitsAndBytesLinearMethod._apply_4bit_weight
    yield BitsAndBytesLinearMethod
    BitsAndBytesLinearMethod._apply_4bit_weight = before


def layer_of(rows: tuple[int, ...], quant_type: str = "nf4") -> Any:
    """A layer with what the plugin's loader puts into one."""
    torch.manual_seed(0)
    parts = [torch.randn(n, COLUMNS).to(torch.bfloat16) for n in rows]
    packed = [quantize_4bit(part, blocksize=64, quant_type=quant_type) for part in parts]
    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.cat([codes for codes, _ in packed]), requires_grad=False)
    layer.weight.bnb_quant_state = dict(enumerate(state for _, state in packed))
    offsets = [0]
    for codes, _ in packed:
        offsets.append(offsets[-1] + len(codes))
    layer.weight.bnb_shard_offsets = torch.tensor(offsets)
    return layer


def decoded(layer: Any) -> torch.Tensor:
    """The weight, by bitsandbytes."""
    codes, starts = layer.weight.data, layer.weight.bnb_shard_offsets.tolist()
    parts = zip(pairwise(starts), layer.weight.bnb_quant_state.values(), strict=True)
    return torch.cat([dequantize_4bit(codes[start:end], state) for (start, end), state in parts])


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)], ids=["one token", "tokens", "with a batch dimension"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", LAYERS.values(), ids=LAYERS.keys())
def test_answers_are_the_plugins(rows: tuple[int, ...], with_bias: bool, shape: tuple[int, ...], method: Any) -> None:
    from vllm_bnb_plugin.quantization.config import BitsAndBytesConfig  # type: ignore[import-untyped]

    layer = layer_of(rows)
    x = torch.randn(*shape, COLUMNS).to(torch.bfloat16)
    bias = torch.randn(sum(rows)).to(torch.bfloat16) if with_bias else None
    linear = method(BitsAndBytesConfig(load_in_4bit=True))
    expected = linear.apply(layer, x, bias)
    for dtype in (torch.bfloat16, torch.float32):
        mine = linear_cpu.method(method._apply_4bit_weight, linear_cpu.Scratch(dtype))(linear, layer_of(rows), x, bias)
        assert mine.dtype == expected.dtype
        # Of the product, and of the sum with the bias, each side rounds to 8 bits; sums are of some 100 products.
        torch.testing.assert_close(mine, expected, rtol=2**-7, atol=2**-4)


@pytest.mark.parametrize("pieces", ["whole", "cut"])
@pytest.mark.parametrize("rows", LAYERS.values(), ids=LAYERS.keys())
def test_weights_are_decoded_to_the_bit(rows: tuple[int, ...], pieces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product with the unit matrix is the weight itself."""
    if pieces == "cut":
        monkeypatch.setattr(linear_cpu, "_PIECE_BYTES", 40 * 2 * COLUMNS)
    scratch = linear_cpu.Scratch(torch.bfloat16)
    layers = [layer_of(rows), layer_of((32,))]  # they share the memory, by turns
    weights = [linear_cpu.Weight(layer.weight, scratch) for layer in layers]
    for _ in range(2):
        for layer, weight in zip(layers, weights, strict=True):
            unit = torch.eye(COLUMNS, dtype=torch.bfloat16)
            assert torch.equal(weight.multiply(unit).T, decoded(layer))
    most = max(sum(part.count for part in piece) for piece in weights[0]._pieces)
    assert most <= 40 if pieces == "cut" else most == sum(rows)


@pytest.mark.parametrize("reason", ["fp4", "many threads"])
def test_left_to_the_plugin(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of((130,), "fp4" if reason == "fp4" else "nf4")
    if reason == "many threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    asked = []

    def theirs(*arguments: Any) -> torch.Tensor:
        asked.append(arguments)
        return torch.zeros(1)

    x = torch.randn(1, COLUMNS).to(torch.bfloat16)
    linear_cpu.method(theirs, linear_cpu.Scratch(torch.bfloat16))("self", layer, x, None)
    assert asked == [("self", layer, x, None)]


def test_its_place_in_the_plugin(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        linear_cpu.install()
        assert method._apply_4bit_weight.__module__ == linear_cpu.__name__
    monkeypatch.setattr(method, "_apply_4bit_weight", lambda self, x: x)
    with pytest.raises(RuntimeError, match=r"BitsAndBytesLinearMethod\._apply_4bit_weight is not vllm-bnb-plugin"):
        linear_cpu.install()
