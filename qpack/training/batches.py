"""Batches: in which order the sequences come, how they are padded, and how a batch is cut in two.

The order is a function of seed and epoch alone, not of what else has drawn random numbers, so a resumed run meets the
batches that it would have met. Sequences of like length come together (`transformers`' rule: shuffled, cut into large
groups, each sorted), since what a batch computes grows with its longest. The longest of all comes first: memory that
does not suffice runs out in the first step.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from qpack.data import IGNORED, Example

Batch = dict[str, Any]
"""Tensors by the model's names for them, and the ``origins`` (FILE:LINE) and the number of ``tokens`` of the batch."""

AROUND = ("origins", "tokens")
"""What stands in a batch for people, not for the model."""


@dataclass(slots=True)
class Order(Sampler[int]):
    """The indices of one epoch; whoever begins an epoch sets it."""

    lengths: Sequence[int]
    group_size: int
    """How many neighbours should be of like length, such as the sequences of a step; 1 leaves them shuffled."""
    seed: int
    epoch: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[int]:
        """Yield every index once."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)  # torch's rule for epochs
        if self.group_size == 1:
            yield from torch.randperm(len(self.lengths), generator=generator).tolist()
        else:
            yield from get_length_grouped_indices(self.lengths, self.group_size, generator=generator)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.lengths)


def collate(examples: Sequence[Example]) -> Batch:
    """Pad on the right to the longest sequence.

    Padding is told by the mask and the labels alone, never by its id: any id does, and an EOS in the text stays one.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    return {
        "input_ids": padded([example["input_ids"] for example in examples], 0),  # (batch, longest)
        "attention_mask": padded([[1] * length for length in lengths], 0),
        "labels": padded([example["labels"] for example in examples], IGNORED),
        "origins": [example["origin"] for example in examples],
        "tokens": sum(lengths),
    }


def cut(batch: Mapping[str, Any], rows: int) -> list[Batch]:
    """Cut a batch into batches of at most ``rows`` rows, for a model: what stands around it is left out."""
    tensors = {name: value for name, value in batch.items() if name not in AROUND}
    columns = [tensor.split(rows) for tensor in tensors.values()]
    return [dict(zip(tensors, part, strict=True)) for part in zip(*columns, strict=True)]


def padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    """Make rows as long as the longest, (rows, longest), with ``value`` behind them."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
