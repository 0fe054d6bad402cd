"""Packing: short sequences share a row of a batch, so that little of it is padding.

They are told apart by position ids that begin anew, without a mask: an all-ones mask would make transformers treat a
row as one sequence, and each would see those before it. That a model keeps to it is for `qpack.training.isolation` to
show. The first token of a sequence is never predicted, packed as not packed, so both learn the same tokens. Which
sequences share a row is `qpack.data.pack`'s, and the same in every epoch.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, overload

import torch
from peft import PeftModel

from qpack.data import IGNORED, Example, pack
from qpack.training.batches import Batch, padded
from qpack.training.isolation import require_isolation
from qpack.training.loop import AdapterTrainer
from qpack.training.settings import TrainSettings


class Packs(Sequence[list[Example]]):
    """Examples in packs of at most ``capacity`` tokens."""

    def __init__(self, examples: Sequence[Example], capacity: int) -> None:
        self._examples = examples
        self._places = pack([len(example["input_ids"]) for example in examples], capacity)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> list[Example]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Example]]: ...
    def __getitem__(self, index: int | slice) -> list[Example] | list[list[Example]]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return [self._examples[place] for place in self._places[index]]


def collate_packs(packs: Sequence[Sequence[Example]]) -> Batch:
    """Put the sequences of every pack behind one another in a row of its own.

    The padding of a row that is shorter than the longest counts as one more sequence, of which nothing is learned.
    """
    lengths = [[len(example["input_ids"]) for example in pack] for pack in packs]
    longest = max(map(sum, lengths))
    positions = [_joined(map(range, [*row, longest - sum(row)])) for row in lengths]
    return {
        "input_ids": padded(
            [_joined(example["input_ids"] for example in pack) for pack in packs], 0
        ),  # (packs, longest)
        "position_ids": torch.tensor(positions),
        "labels": padded([_joined(example["labels"] for example in pack) for pack in packs], IGNORED),
        "origins": [example["origin"] for pack in packs for example in pack],
        "tokens": sum(map(sum, lengths)),
    }


class PackingTrainer(AdapterTrainer):
    """`AdapterTrainer` on packs, which are all about as long: their order is left shuffled."""

    collate: Callable[[Sequence[Any]], Batch] = staticmethod(collate_packs)

    def __init__(self, model: PeftModel, *args: Any, **kwargs: Any) -> None:
        """Refuse a model that would mix them, as it is when the Trainer is done with it."""
        super().__init__(model, *args, **kwargs)
        require_isolation(model)

    @staticmethod
    def arrange(examples: Sequence[Any], settings: TrainSettings) -> Sequence[Any]:
        """Pack them."""
        return Packs(examples, settings.max_length)

    @staticmethod
    def length(example: Any) -> int:
        """Return the same for all."""
        return 1


def _joined(rows: Iterable[Sequence[int]]) -> list[int]:
    return list(chain.from_iterable(rows))
