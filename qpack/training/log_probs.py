"""Log-probabilities of what is learned, without the logits of a batch ever being whole.

Between the last hidden state and a log-probability stand the output head and, in some families, a scale or a soft cap::

    log p(label) = log_softmax(finish(head(hidden)))[label]        finish: x * scale, cap * tanh(x / cap), or nothing

They are computed in pieces, and once more in the backward pass, so that the logits of one piece are all that exists of
them. The model's own forward pass gives the hidden states: its head is handed the first position alone, whose logits
are so few that they tell what ``finish`` is, by comparison. A model that does something else there gets its logits
whole, and a warning.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qpack.data import IGNORED

Finish = Callable[[torch.Tensor], torch.Tensor]

logger = logging.getLogger(__name__)

PIECE = 1 << 26
"""How many logits exist at a time: 256 MiB of float32."""

_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""What families call a factor of the logits in their config, and whether it multiplies (1) or divides (-1)."""


def give_log_probs(model: PreTrainedModel) -> None:
    """Let ``model``, called with labels, return a dict with ``log_probs``: of each sequence's learned tokens, (batch,).

    Only labels that are not IGNORED count, each predicted at the position before it. Called without labels the model
    does what it did.
    """
    stock = model.forward
    finishes = _finishes(model)

    def forward(*args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return stock(*args, **kwargs)
        if finishes:
            head = cast(nn.Module, model.get_output_embeddings())
            with _first_position_alone(head) as inputs:
                shown = stock(*args, **kwargs, use_cache=False).logits  # (batch, 1, vocabulary)
            hidden = inputs[0]  # (batch, length, hidden)
            alike = [finish for finish in finishes if _agree(finish(head(hidden[:, :1])), shown)]
            finishes[:] = alike[:1]
            if finishes:
                return {"log_probs": _in_pieces(hidden, head, finishes[0], labels)}
            logger.warning("%s: its logits are computed whole, its head being of no known kind", type(model).__name__)
        return {"log_probs": whole_log_probs(stock(*args, **kwargs, use_cache=False).logits, labels)}

    cast(Any, model).forward = forward


@contextmanager
def _first_position_alone(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yield a list that will hold what ``head`` is called with, of which it is given the first position."""
    inputs: list[torch.Tensor] = []

    def first_position(_: nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
        inputs.append(given[0])
        return given[0][:, :1]

    handle = head.register_forward_pre_hook(first_position)
    try:
        yield inputs
    finally:
        handle.remove()


def whole_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of the learned labels of each sequence, (batch,), from (batch, length, vocabulary)."""
    learned = labels[:, 1:] != IGNORED
    return _summed(_label_log_probs(logits[:, :-1][learned], labels[:, 1:][learned]), learned)


def _in_pieces(hidden: torch.Tensor, head: nn.Module, finish: Finish, labels: torch.Tensor) -> torch.Tensor:
    def piece(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _label_log_probs(finish(head(states)), targets)

    learned = labels[:, 1:] != IGNORED
    states, targets = hidden[:, :-1][learned], labels[:, 1:][learned]  # (n, hidden), (n,)
    rows = max(PIECE // cast(torch.Tensor, head.weight).shape[0], 1)
    pieces = zip(states.split(rows), targets.split(rows), strict=True)
    return _summed(torch.cat([checkpoint(piece, *each, use_reentrant=False) for each in pieces]), learned)


def _label_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -cross_entropy(logits.float(), labels, reduction="none")


def _summed(log_probs: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """Sum over each sequence what stands at its learned places, (n,) to (batch,)."""
    return log_probs.new_zeros(len(learned)).index_add(0, learned.nonzero()[:, 0], log_probs)


def _finishes(model: PreTrainedModel) -> list[Finish]:
    """What ``model`` may do to its logits, likeliest first: what its config has a number for, or nothing."""
    config = model.config.get_text_config()
    found: list[Finish] = []
    for name, power in _SCALES.items():
        if scale := getattr(config, name, None):
            found.append(lambda logits, factor=scale**power: logits * factor)  # type: ignore[misc]
    if cap := getattr(config, "final_logit_softcapping", None):
        found.append(lambda logits: cap * torch.tanh(logits / cap))
    return [*found, lambda logits: logits]


def _agree(logits: torch.Tensor, shown: torch.Tensor) -> bool:
    """Whether they are the same but for rounding in the dtype of the model."""
    return torch.allclose(logits.float(), shown.float(), rtol=2e-2, atol=1e-3)
