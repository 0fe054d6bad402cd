"""The loss without logits is the stock one, to the gradient, and no tensor of tokens x vocabulary is made for it."""

import logging
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, Largest, of_family
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from qpack.data import IGNORED
from qpack.training import log_probs
from qpack.training.log_probs import give_loss

ROWS, LENGTH = 3, 64


def batch() -> dict[str, torch.Tensor]:
    """Sequences whose beginnings are not learned."""
    ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.where(torch.arange(LENGTH) > torch.tensor([[3], [9], [14]]), IGNORED)}


def loss_and_gradients(model: Any, items: Any = None) -> list[torch.Tensor]:
    loss = model(**batch(), **({} if items is None else {"num_items_in_batch": items}))["loss"]
    return [
        loss.detach(),
        *torch.autograd.grad(3 * loss, [weight for weight in model.parameters() if weight.requires_grad]),
    ]


@pytest.mark.parametrize("head_learns", [False, True], ids=["head frozen", "head learns"])
@pytest.mark.parametrize(("family", "special"), FAMILIES)
def test_loss_and_gradients_are_the_stock_ones(
    family: str,
    special: dict[str, Any],
    head_learns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = of_family(family, special)
    model.get_output_embeddings().requires_grad_(head_learns)
    expected = [*loss_and_gradients(model), *loss_and_gradients(model, torch.tensor(500))]
    monkeypatch.setattr(log_probs, "LOGITS_AT_A_TIME", 4 * VOCABULARY)
    give_loss(model)
    largest = Largest()  # type: ignore[no-untyped-call]
    with caplog.at_level(logging.WARNING), largest:
        found = [*loss_and_gradients(model), *loss_and_gradients(model, torch.tensor(500))]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch())["loss"], expected[0])
    assert not [record for record in caplog.records if record.name.startswith("qpack")]
    assert largest.elements == VOCABULARY * 64  # the head's weight; logits of all tokens are three times that


class HeadRows(TorchDispatchMode):
    """Counts the positions that are multiplied by the head, forward or backward."""

    rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.mm.default and VOCABULARY in (*args[0].shape, *args[1].shape):
            self.rows += args[0].shape[0]
        return function(*args, **(kwargs or {}))


def test_a_frozen_head_costs_two_products_of_learned_positions() -> None:
    model = of_family(*FAMILIES[0])
    model.get_output_embeddings().requires_grad_(False)
    give_loss(model)
    with HeadRows() as head:  # type: ignore[no-untyped-call]
        loss_and_gradients(model)
    learned = int((batch()["labels"][:, 1:] != IGNORED).sum())
    assert head.rows == 2 * learned + 2 * ROWS  # the head's kind is told by the first positions, twice


def test_a_loss_that_is_more_than_the_next_tokens_stays(caplog: pytest.LogCaptureFixture) -> None:
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        output_router_logits=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    expected = loss_and_gradients(model)[0]
    with caplog.at_level(logging.WARNING):
        give_loss(model)
    assert loss_and_gradients(model)[0] == expected
    assert [record.getMessage() for record in caplog.records] == [
        "MixtralForCausalLM: its logits are computed whole, for the loss of its router"
    ]
