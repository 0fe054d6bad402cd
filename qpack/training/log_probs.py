"""The loss, and log-probabilities of what is learned, without the logits of a batch ever being whole.

Between the last hidden state and a log-probability stand the output head and, in some families, a scale or a soft cap::

    log p(label) = log_softmax(finish(head(hidden)))[label]        finish: x * scale, cap * tanh(x / cap), or nothing

Only positions with a label to learn are computed, in pieces, so that the logits of one piece are all that exists of
them. Where the head is frozen a piece leaves its derivative behind, d log p / d hidden, and its logits are not needed
again: two products with the head instead of three. Where it learns, or in float16, whose small derivatives would
vanish before the loss is scaled, a piece is computed once more in the backward pass.

The model's own forward pass gives the hidden states: its head is handed the first position alone, whose logits
are so few that they tell what ``finish`` is, by comparison. A model that does something else there, or whose loss is
more than that of the next token, gets its logits whole, and a warning.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from qpack.data import IGNORED
from qpack.training.settings import LOGITS_AT_A_TIME

Finish = Callable[[torch.Tensor], torch.Tensor]

logger = logging.getLogger(__name__)

_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""What families call a factor of the logits in their config, and whether it multiplies (1) or divides (-1)."""


def give_loss(model: PreTrainedModel) -> bool:
    """Let ``model``, called with labels, return a dict with the ``loss`` alone; return whether it does.

    It is the sum over the learned tokens, by ``num_items_in_batch`` or, where that is not given, by their number.
    Called without labels the model does what it did, and so does always one whose loss is more than that.
    """
    stock = model.forward
    log_probs = _LearnedLogProbs(model)
    if more := _more_than_next_token(model):
        logger.warning("%s: its logits are computed whole, for %s", type(model).__name__, more)
        return False

    @wraps(stock)  # whoever looks at what the model takes sees that
    def forward(
        *args: Any,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return stock(*args, **kwargs)
        found = log_probs(labels, *args, **kwargs)
        items = len(found) if num_items_in_batch is None else num_items_in_batch
        return {"loss": -found.sum() / (items.to(found.device) if isinstance(items, torch.Tensor) else items)}

    cast(Any, model).forward = forward
    return True


def give_log_probs(model: PreTrainedModel) -> bool:
    """Let ``model``, called with labels, return a dict with ``log_probs``: of each sequence's learned tokens, (batch,).

    Only labels that are not IGNORED count, each predicted at the position before it. Called without labels the model
    does what it did. Every model does so: True is returned.
    """
    stock = model.forward
    log_probs = _LearnedLogProbs(model)

    @wraps(stock)
    def forward(*args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return stock(*args, **kwargs)
        return {"log_probs": _summed(log_probs(labels, *args, **kwargs), labels[:, 1:] != IGNORED)}

    cast(Any, model).forward = forward
    return True


class _LearnedLogProbs:
    """The log-probability of each learned label, (n,), by a model's forward pass as it is now."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.stock = model.forward
        self.finishes = _finishes(model)

    def __call__(self, labels: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute them for (batch, length) ``labels``; the rest is what the model takes."""
        if self.finishes:
            head = cast(nn.Module, self.model.get_output_embeddings())
            with _first_position_alone(head) as inputs:
                shown = self.stock(*args, **kwargs, use_cache=False).logits  # (batch, 1, vocabulary)
            hidden = inputs[0]  # (batch, length, hidden)
            with torch.no_grad():
                first = head(hidden[:, :1].contiguous())
                self.finishes = [finish for finish in self.finishes if _agree(finish(first), shown)][:1]
            if self.finishes:
                return _in_pieces(hidden, head, self.finishes[0], labels, vocabulary=shown.shape[-1])
            name = type(self.model).__name__
            logger.warning("%s: its logits are computed whole, its head being of no known kind", name)
        return _of_logits(self.stock(*args, **kwargs, use_cache=False).logits, labels)


class _Frozen(torch.autograd.Function):
    """`_label_log_probs` of (n, hidden) states, whose derivatives by them are all that is kept."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, labels: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Compute the log-probabilities and, by d log p(label) / d logits = (at the label 1) - p, their derivatives."""
        with torch.enable_grad():
            leaf = states.detach().requires_grad_()
            logits = logits_of(leaf)  # (n, vocabulary)
        every = log_softmax(logits.detach().float(), dim=-1)
        found = every.gather(1, labels[:, None])
        slope = every.exp_().neg_()  # in place: nothing here is small
        slope.scatter_add_(1, labels[:, None], torch.ones_like(found))
        (derivative,) = torch.autograd.grad(logits, leaf, slope.to(logits.dtype))
        ctx.save_for_backward(derivative)
        return found[:, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Weigh each state's derivative."""
        (derivative,) = ctx.saved_tensors
        return (derivative * gradients[0][:, None]).to(derivative.dtype), None, None


@contextmanager
def _first_position_alone(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yield a list that will hold what ``head`` is called with, of which it is given the first position."""
    inputs: list[torch.Tensor] = []

    def first_position(_: nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
        inputs.append(given[0])
        return given[0][:, :1].contiguous()  # or the product would be one a sequence

    handle = head.register_forward_pre_hook(first_position)
    try:
        yield inputs
    finally:
        handle.remove()


def whole_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of the learned labels of each sequence, (batch,), from (batch, length, vocabulary)."""
    return _summed(_of_logits(logits, labels), labels[:, 1:] != IGNORED)


def _of_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    learned = labels[:, 1:] != IGNORED
    return _label_log_probs(logits[:, :-1][learned], labels[:, 1:][learned])


def _in_pieces(
    hidden: torch.Tensor, head: nn.Module, finish: Finish, labels: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    def logits_of(states: torch.Tensor) -> torch.Tensor:
        return finish(head(states))

    def piece(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _label_log_probs(logits_of(states), targets)

    def frozen(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, _Frozen.apply(states, targets, logits_of))  # type: ignore[no-untyped-call]

    def recomputed(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, checkpoint(piece, states, targets, use_reentrant=False))

    learned = labels[:, 1:] != IGNORED
    states, targets = hidden[:, :-1][learned], labels[:, 1:][learned]  # (n, hidden), (n,)
    compute = piece
    if torch.is_grad_enabled():
        again = any(weight.requires_grad or weight.dtype == torch.float16 for weight in head.parameters())
        compute = recomputed if again else frozen
    rows = max(LOGITS_AT_A_TIME // vocabulary, 1)
    return torch.cat([compute(*each) for each in zip(states.split(rows), targets.split(rows), strict=True)])


def _label_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -cross_entropy(logits.float(), labels, reduction="none")


def _summed(log_probs: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """Sum over each sequence what stands at its learned places, (n,) to (batch,)."""
    return log_probs.new_zeros(len(learned)).index_add(0, learned.nonzero()[:, 0], log_probs)


def _more_than_next_token(model: PreTrainedModel) -> str | None:
    """What ``model`` adds to the loss of the next token, or has in its place, if anything."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return "the loss of its router"
    if model.loss_function is not ForCausalLMLoss:
        return f"its own loss {model.loss_type}"
    return None


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
