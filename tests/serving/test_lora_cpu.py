"""The multi-LoRA products against the sum that they stand for, alone and behind vLLM's own interface."""

from typing import Any

import pytest
import torch

from serve.lora_cpu import expand, plan, shrink, take

SLOTS, RANK, WIDTH_IN = 6, 4, 32
WIDTHS = (24, 8)  # of a fused layer's two slices

# Slots of a step's rows; -1 is the base. What no row has is in the way where it lies between two that have some.
STEPS = {
    "nothing": [],
    "base alone": [-1, -1, -1],
    "one adapter": [2] * 40,
    "one adapter, few rows": [2, 2],
    "one in every slot": [5, 3, 1, 0, 2, 4],
    "base between": [-1, 0, 0, -1, -1, 2, 0, 5, -1],
    "a prompt among answers": [3, 0, *[1] * 50, -1, 3, 4],
    "two prompts and the base": [0] * 20 + [-1] * 5 + [4] * 17,
    "a prompt in two pieces": [1] * 12 + [0] + [1] * 12,
}


def stacked(used: list[int], shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Factors of all slots; those of slots that no row uses hold no number."""
    weights = torch.randn(SLOTS, 1, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for slot in set(range(SLOTS)) - set(used):
        weights[slot] = torch.nan
    return weights


def assert_added(y: torch.Tensor, before: torch.Tensor, x: torch.Tensor, slots: list[int], layer: Any) -> None:
    """``y`` is ``before`` plus every adapter's product on its rows, and the base's rows are untouched."""
    for row, slot in enumerate(slots):
        if slot < 0:
            assert torch.equal(y[row], before[row])
            continue
        parts = [b[slot, 0].double() @ (a[slot, 0].double() @ x[row].double()) for a, b in layer]
        # In bfloat16 the rank's values, their product and the sum are rounded, each by 2**-8 of what it is.
        rtol, atol = (2**-6, 2**-5) if y.dtype == torch.bfloat16 else (1e-5, 1e-5)
        torch.testing.assert_close(y[row].double(), before[row].double() + torch.cat(parts), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("slots", STEPS.values(), ids=STEPS.keys())
def test_every_row_gets_its_adapters_product(slots: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = [
        (stacked(slots, (RANK, WIDTH_IN), n, dtype) / 4, stacked(slots, (width, RANK), 9 + n, dtype) / 4)
        for n, width in enumerate(WIDTHS)
    ]
    x = torch.randn(len(slots), WIDTH_IN).to(dtype)
    before = torch.randn(len(slots), sum(WIDTHS)).to(dtype)
    y = before.clone()
    for share in plan(slots):
        column = 0
        for (a, b), width in zip(layer, WIDTHS, strict=True):
            expand(share, shrink(share, take(share, x, dtype), a), b, y, column)
            column += width
    assert_added(y, before, x, slots, layer)


def test_a_batch_of_answers_is_one_product() -> None:
    assert len(plan([0, 3, 1, -1, 2, 0])) == 1
    assert len(plan([0] * 100 + [1, 2, 3])) == 2
    assert plan([-1] * 100) == ()


def test_padding_of_the_weights_is_left_out() -> None:
    [share] = plan([0, 0])
    y = torch.zeros(2, 5)
    expand(share, torch.ones(1, 2, RANK), torch.ones(1, 1, 8, RANK), y, 0)
    assert torch.equal(y, torch.full((2, 5), float(RANK)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
class TestBehindVllm:
    """`serve.punica.Products`, told of its rows as vLLM's LoRA manager does."""

    def wrapper(self, slots: list[int], sampled: list[int]) -> Any:
        """One for a step; vLLM names adapters by numbers and knows which is in which slot."""
        from vllm.lora.layers import LoRAMapping

        from serve.punica import Products

        numbers = [*range(11, 11 + SLOTS)]
        tokens, prompts = (tuple(numbers[n] if n >= 0 else 0 for n in rows) for rows in (slots, sampled))
        mapping = LoRAMapping(tokens, prompts, is_prefill=True)
        products = Products(max_num_batched_tokens=128, max_batches=128, device="cpu")
        products.update_metadata(mapping, numbers, SLOTS + 1, 100)
        return products

    @pytest.mark.parametrize("slots", [slots for slots in STEPS.values() if slots])
    def test_linear(self, slots: list[int]) -> None:
        layer = [
            (stacked(slots, (RANK, WIDTH_IN), n, torch.bfloat16) / 4, stacked(slots, (w, RANK), n, torch.bfloat16) / 4)
            for n, w in enumerate(WIDTHS)
        ]
        x = torch.randn(len(slots), WIDTH_IN).to(torch.bfloat16)
        before = torch.randn(len(slots), sum(WIDTHS)).to(torch.bfloat16)
        y = before.clone()
        self.wrapper(slots, slots).add_lora_linear(y, x, *zip(*layer, strict=True), 1.0, WIDTHS)
        assert_added(y, before, x, slots, layer)

    def test_output_embedding(self) -> None:
        """Of the rows that are sampled, not of all; and of a prompt's rows none."""
        sampled = [4, -1, 0]
        a, b = stacked(sampled, (RANK, WIDTH_IN), 0, torch.float32), stacked(sampled, (24, RANK), 1, torch.float32)
        x, before = torch.randn(3, WIDTH_IN), torch.randn(3, 24)
        products = self.wrapper([4] * 7 + [-1] + [0] * 5, sampled)
        y = before.clone()
        products.add_lora_logits(y, x, a, b, 0.5)
        assert_added(y, before, x, sampled, [(0.5 * a, b)])
        prompt = torch.randn(6, 24)
        y = prompt.clone()
        products.add_lora_logits(y, torch.randn(6, WIDTH_IN), a, b, 1.0)
        assert torch.equal(y, prompt)

    def test_embedding(self) -> None:
        slots = [1, -1, 1, 3]
        b = stacked(slots, (24, RANK), 1, torch.float32)
        looked_up, before = torch.randn(4, RANK), torch.randn(4, 24)
        y = before.clone()
        self.wrapper(slots, slots).add_lora_embedding(y, looked_up, b, add_input=True)
        assert_added(y, before, looked_up, slots, [(torch.eye(RANK).expand(SLOTS, 1, RANK, RANK), b)])

    def test_refused_is_what_no_server_here_asks_for(self) -> None:
        products = self.wrapper([0], [0])
        for method in (products.add_shrink, products.add_expand, products.apply_lora_full_linear):
            with pytest.raises(NotImplementedError):
                method()

    def test_its_place_in_vllm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
        from vllm.platforms.cpu import CpuPlatform
        from vllm.utils.import_utils import resolve_obj_by_qualname

        from serve import plugin, punica

        monkeypatch.setattr(CpuPlatform, "get_punica_wrapper", CpuPlatform.get_punica_wrapper)  # put back at the end
        for _ in range(2):
            plugin._multiply_adapters(CpuPlatform)
            assert resolve_obj_by_qualname(CpuPlatform.get_punica_wrapper()) is punica.Products
        monkeypatch.setattr(CpuPlatform, "get_punica_wrapper", classmethod(lambda cls: "another.Wrapper"))
        with pytest.raises(RuntimeError, match=r"CpuPlatform\.get_punica_wrapper is not vLLM 0\.32's"):
            plugin._multiply_adapters(CpuPlatform)
        monkeypatch.setattr(PunicaWrapperCPU, "add_lora_logits", lambda self, y, x: None)
        with pytest.raises(RuntimeError, match=r"PunicaWrapperCPU\.add_lora_logits is not vLLM 0\.32's"):
            punica._require_same_parameters()
