"""Direct preference optimization: of two answers the adapter learns to prefer one, against the base as it was.

::

    reward(y) = beta * (log p(y | x) - log p_base(y | x))       log p: summed over the tokens of the answer y
    loss      = -log sigmoid(reward(chosen) - reward(rejected))           mean over the pairs of a step

Rafailov et al., arXiv 2305.18290, equation 7. The reference p_base is the base with the adapter off: a second forward
pass without gradients, and no second model. It runs without dropout, as the model answers.

A batch is (pairs, 2, tokens), chosen first. So a row is a pair, and whoever cuts a batch keeps pairs together; the
model sees (2 * pairs, tokens).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from qpack.data import Preference
from qpack.training.batches import AROUND, Batch, collate
from qpack.training.log_probs import give_log_probs
from qpack.training.loop import AdapterTrainer
from qpack.training.report import Rewards


def collate_pairs(preferences: Sequence[Preference]) -> Batch:
    """Pad on the right to the longest answer of all."""
    batch = collate([side for pair in preferences for side in (pair["chosen"], pair["rejected"])])
    tensors = {name: value.unflatten(0, (-1, 2)) for name, value in batch.items() if name not in AROUND}
    return {**tensors, "origins": batch["origins"][::2], "tokens": batch["tokens"]}


@contextmanager
def reference(model: PeftModel) -> Iterator[None]:
    """Let ``model`` be the base, and leave it as it was."""
    training = model.training
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        yield
    model.train(training)


def rewards(model: PeftModel, forward: nn.Module, batch: Batch, beta: float) -> torch.Tensor:
    """Return what each answer is rewarded with, (pairs, 2), chosen first.

    ``model`` gives log-probabilities (`give_log_probs`); ``forward`` is it, or what is wrapped around it for training.
    """
    sides = {name: tensor.flatten(0, 1) for name, tensor in batch.items() if name not in AROUND}
    with reference(model):
        base: torch.Tensor = model(**sides)["log_probs"]
    trained: torch.Tensor = forward(**sides)["log_probs"]
    return beta * (trained - base).view(-1, 2)


def preference_losses(rewards: torch.Tensor) -> torch.Tensor:
    """Return the loss of each pair, (pairs,)."""
    return -logsigmoid(rewards[:, 0] - rewards[:, 1])


class PreferenceTrainer(AdapterTrainer):
    """`AdapterTrainer` on pairs of answers."""

    collate: Callable[[Sequence[Any]], Batch] = staticmethod(collate_pairs)
    give: Callable[[PreTrainedModel], bool] = staticmethod(give_log_probs)

    @staticmethod
    def length(example: Preference) -> int:
        """What a pair costs: as much as its longer side, twice."""
        return max(len(example["chosen"]["input_ids"]), len(example["rejected"]["input_ids"]))

    @staticmethod
    def items(batch: Batch) -> int:
        """Over how many items the loss of a batch is a sum: its pairs."""
        return len(batch["labels"])

    def __init__(self, model: PeftModel, *args: Any, **kwargs: Any) -> None:
        """Keep the model that the reference is a part of."""
        super().__init__(model, *args, **kwargs)
        self.adapted = model
        self.rewards: list[torch.Tensor] = []

    def begin_step(self) -> None:
        """Forget the last step."""
        super().begin_step()
        self.rewards = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the share of these pairs in the loss of a step of ``num_items_in_batch`` pairs, or their mean."""
        found = rewards(self.adapted, model, inputs, self.settings.beta)
        self.rewards.append(found.detach())
        losses = preference_losses(found)
        if num_items_in_batch is None:
            return losses.mean()
        # The gradients of several processes are averaged, and this is a share of a sum.
        return losses.sum() * self.args.world_size / num_items_in_batch

    def step_rewards(self) -> Rewards:
        """What the step's pairs, of all processes, were rewarded with."""
        rewards = torch.tensor(self.processes.gathered(torch.cat(self.rewards).tolist())).flatten(0, -2)  # (pairs, 2)
        chosen, rejected = rewards.mean(dim=0).tolist()
        return Rewards(chosen, rejected, chosen - rejected, (rewards[:, 0] > rewards[:, 1]).float().mean().item())
