"""The multi-LoRA ops against the sum that they stand for, and their way into vLLM."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from serve import lora_cpu

SLOTS, RANK, WIDTH_IN, WIDTH_OUT = 3, 4, 16, 24

# Tokens of the base at the start, between adapters and at the end; an adapter that comes twice.
INDICES = torch.tensor([-1, 0, 0, -1, -1, 2, 0, 1, -1])


@pytest.fixture
def a() -> torch.Tensor:
    """A of every slot; the last slot, which -1 would pick, holds no number."""
    weights = torch.randn(SLOTS + 1, 1, RANK, WIDTH_IN, generator=torch.Generator().manual_seed(0))
    weights[-1] = torch.nan
    return weights


@pytest.fixture
def b() -> torch.Tensor:
    """B of every slot, likewise."""
    weights = torch.randn(SLOTS + 1, 1, WIDTH_OUT, RANK, generator=torch.Generator().manual_seed(1))
    weights[-1] = torch.nan
    return weights


def test_shrink_writes_the_rows_of_adapters(a: torch.Tensor) -> None:
    x = torch.randn(len(INDICES), WIDTH_IN, dtype=torch.bfloat16)
    y = torch.zeros(len(INDICES), RANK)
    lora_cpu.bgmv_shrink(x, a, y, INDICES, 0.5)
    for row, slot in enumerate(INDICES.tolist()):
        expected = torch.zeros(RANK) if slot < 0 else 0.5 * (a[slot, 0] @ x[row].float())
        torch.testing.assert_close(y[row], expected)


@pytest.mark.parametrize("add", [True, False])
def test_expand_leaves_the_base_and_the_padding_alone(b: torch.Tensor, add: bool) -> None:
    x = torch.randn(len(INDICES), RANK)
    before = torch.randn(len(INDICES), WIDTH_OUT + 8)
    y = before.clone()
    lora_cpu.bgmv_expand(x, b, y, INDICES, add)
    torch.testing.assert_close(y[:, WIDTH_OUT:], before[:, WIDTH_OUT:], rtol=0, atol=0)
    for row, slot in enumerate(INDICES.tolist()):
        kept = before[row, :WIDTH_OUT]
        expected = kept if slot < 0 else b[slot, 0] @ x[row] + (kept if add else 0)
        torch.testing.assert_close(y[row, :WIDTH_OUT], expected)


def test_expand_slice_touches_its_columns_only(b: torch.Tensor) -> None:
    x = torch.randn(len(INDICES), RANK)
    before = torch.randn(len(INDICES), WIDTH_OUT + 20)
    y = before.clone()
    lora_cpu.bgmv_expand_slice(x, b, y, INDICES, 10, WIDTH_OUT)
    for row, slot in enumerate(INDICES.tolist()):
        expected = before[row].clone()
        if slot >= 0:
            expected[10 : 10 + WIDTH_OUT] += b[slot, 0] @ x[row]
        torch.testing.assert_close(y[row], expected)


@pytest.fixture
def vllm_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """Stand-ins for the two modules of vLLM that are changed, with ops of the right parameters."""
    ops, wrapper = ModuleType("vllm.lora.ops.torch_ops.lora_ops"), ModuleType("vllm.lora.punica_wrapper.punica_cpu")
    for module in (ops, wrapper):
        for op in (lora_cpu.bgmv_shrink, lora_cpu.bgmv_expand, lora_cpu.bgmv_expand_slice):
            vars(module)[op.__name__] = _same_parameters(op)
    parents = ("vllm", "vllm.lora", "vllm.lora.ops", "vllm.lora.ops.torch_ops", "vllm.lora.punica_wrapper")
    for name in parents:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (ops, wrapper):
        parent, _, name = module.__name__.rpartition(".")
        setattr(sys.modules[parent], name, module)
    yield ops, wrapper


def _same_parameters(op: object) -> object:
    def theirs() -> None: ...

    theirs.__wrapped__ = op  # type: ignore[attr-defined]  # what inspect.signature follows
    return theirs


def test_install_replaces_the_ops_and_can_be_repeated(vllm_modules: tuple[ModuleType, ModuleType]) -> None:
    for _ in range(2):
        lora_cpu.install()
        for module in vllm_modules:
            assert module.bgmv_shrink is lora_cpu.bgmv_shrink
            assert module.bgmv_expand is lora_cpu.bgmv_expand
            assert module.bgmv_expand_slice is lora_cpu.bgmv_expand_slice


@pytest.mark.parametrize("theirs", [None, lambda inputs, weights: None], ids=["missing", "other parameters"])
def test_install_refuses_another_vllm(vllm_modules: tuple[ModuleType, ModuleType], theirs: object) -> None:
    vars(vllm_modules[1])["bgmv_expand_slice"] = theirs
    with pytest.raises(RuntimeError, match=r"punica_cpu\.bgmv_expand_slice is not vLLM 0\.32's"):
        lora_cpu.install()
