"""Batches: in which order the sequences come, how they are padded or packed, and how a batch is cut in two.

The order is a function of seed and epoch alone, not of what else has drawn random numbers, so a resumed run meets the
batches that it would have met. Sequences of like length come together (`transformers`' rule: shuffled, cut into large
groups, each sorted), since what a batch computes grows with its longest. The longest of all comes first: memory that
does not suffice runs out in the first step.

A packed batch holds several sequences in each row, told apart by position ids that begin anew, and no mask: an
all-ones mask would make transformers treat the row as one sequence, and each would see those before it. The first
token of a sequence is never predicted, packed as not packed, so both learn the same tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
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
    """How many neighbours should be of like length: the sequences of a step; 1 leaves them shuffled."""
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
        "input_ids": _padded([example["input_ids"] for example in examples], 0),  # (batch, longest)
        "attention_mask": _padded([[1] * length for length in lengths], 0),
        "labels": _padded([example["labels"] for example in examples], IGNORED),
        "origins": [example["origin"] for example in examples],
        "tokens": sum(lengths),
    }


def collate_packed(packs: Sequence[Sequence[Example]]) -> Batch:
    """Put the sequences of every pack behind one another in a row of its own.

    The padding of a row that is shorter than the longest counts as one more sequence, of which nothing is learned.
    """
    lengths = [[len(example["input_ids"]) for example in pack] for pack in packs]
    longest = max(map(sum, lengths))
    positions = [[*row, longest - sum(row)] for row in lengths]
    return {
        "input_ids": _padded([_joined(example["input_ids"] for example in pack) for pack in packs], 0),
        "position_ids": torch.tensor([_joined(range(length) for length in row) for row in positions]),
        "labels": _padded([_joined([IGNORED, *example["labels"][1:]] for example in pack) for pack in packs], IGNORED),
        "origins": [example["origin"] for pack in packs for example in pack],
        "tokens": sum(map(sum, lengths)),
    }


def cut(batch: Mapping[str, Any], rows: int) -> list[Batch]:
    """Cut a batch into batches of at most ``rows`` rows, for a model: what stands around it is left out."""
    tensors = {name: value for name, value in batch.items() if name not in AROUND}
    columns = [tensor.split(rows) for tensor in tensors.values()]
    return [dict(zip(tensors, part, strict=True)) for part in zip(*columns, strict=True)]


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def _joined(rows: Iterator[Sequence[int]]) -> list[int]:
    return list(chain.from_iterable(rows))
