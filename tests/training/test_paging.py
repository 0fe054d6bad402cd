"""The optimizer's state, plain tensors after it was loaded, is paged again as bitsandbytes would have paged it."""

from typing import Any

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW, PagedAdamW8bit, PagedAdamW32bit

from qpack.training.paging import page_again

LARGE, SMALL = (400, 500), (16, 100)


def loaded(optimizer: Any, device: str) -> Any:
    """One that goes on from the state of another after a step."""

    def made() -> Any:
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in (LARGE, SMALL)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        return optimizer(parameters)

    before, after = made(), made()
    before.step()
    after.load_state_dict(before.state_dict())
    return after


@pytest.mark.gpu
@pytest.mark.parametrize(("optimizer", "moment"), [(PagedAdamW8bit, 1), (PagedAdamW32bit, 4)])
def test_large_states_are_paged_and_keep_their_values(optimizer: Any, moment: int) -> None:
    stepped = loaded(optimizer, "cuda")
    values = {id(state): state["state1"].clone() for state in stepped.state.values()}
    assert page_again(stepped) == 2 * moment * LARGE[0] * LARGE[1]  # two moments; the small ones never are
    for parameter, state in stepped.state.items():
        assert getattr(state["state1"], "is_paged", False) == (parameter.shape == torch.Size(LARGE))
        assert torch.equal(state["state1"], values[id(state)])
    stepped.step()
    assert page_again(stepped) == 0


@pytest.mark.parametrize("optimizer", [AdamW, torch.optim.AdamW])
def test_what_is_not_paged_is_left_alone(optimizer: Any) -> None:
    assert page_again(loaded(optimizer, "cpu")) == 0
