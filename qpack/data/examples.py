"""Tokens and labels, held in few bytes: a sequence in memory is 5 bytes a token, and becomes lists when it is taken.

Python's own lists would take ten times as much, and a hundred thousand conversations are fifty million tokens.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypedDict, overload

IGNORED = -100
"""The label that the loss of transformers and torch skips."""


class Example(TypedDict):
    """One sequence: its tokens, for each token itself if it is learned, else :data:`IGNORED`, and its ``FILE:LINE``.

    The first label is always IGNORED: nothing stands before the first token that could predict it. So sequences that
    share a forward pass never learn across their borders.
    """

    input_ids: list[int]
    labels: list[int]
    origin: str


class Preference(TypedDict):
    """Two sequences that begin with the same prompt; the labels of both are IGNORED in it."""

    chosen: Example
    rejected: Example


class Examples(Sequence[Example]):
    """A sequence of examples that only grows."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._learned = bytearray()
        self._ends = [0]
        self._origins: list[str] = []
        self._order: list[int] = []

    def append(self, input_ids: Sequence[int], learned: Iterable[tuple[int, int]], origin: str) -> None:
        """Add a sequence of which the tokens in the ranges ``learned`` are learned, the first excepted."""
        marks = bytearray(len(input_ids))
        for start, end in learned:
            marks[start:end] = b"\x01" * (min(end, len(marks)) - start)
        marks[:1] = b"\x00" * len(marks[:1])
        self._order.append(len(self._origins))
        self._ids.extend(input_ids)
        self._learned += marks
        self._ends.append(len(self._ids))
        self._origins.append(origin)

    def repeat(self, start: int, times: int) -> None:
        """Let the sequences from ``start`` on stand there ``times`` times."""
        self._order += self._order[start:] * (times - 1)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        each = [end - start for start, end in pairwise(self._ends)]
        return [each[index] for index in self._order]

    @property
    def learned(self) -> list[int]:
        """Learned tokens of each sequence."""
        each = [self._learned.count(1, start, end) for start, end in pairwise(self._ends)]
        return [each[index] for index in self._order]

    @property
    def duplicates(self) -> int:
        """Sequences whose tokens all stand in an earlier one, repetition by weight not counted."""
        return len(self._origins) - len({self._ids[start:end].tobytes() for start, end in pairwise(self._ends)})

    def digest(self) -> str:
        """SHA-256 of all tokens and labels in their order, in hexadecimal."""
        digest = hashlib.sha256()
        for part in (self._ids, self._learned, array("q", self._ends), array("q", self._order)):
            digest.update(part)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        place = self._order[index]
        start, end = self._ends[place], self._ends[place + 1]
        ids = self._ids[start:end].tolist()
        learned = self._learned[start:end]
        labels = [token if mark else IGNORED for token, mark in zip(ids, learned, strict=True)]
        return Example(input_ids=ids, labels=labels, origin=self._origins[place])


class Preferences(Sequence[Preference]):
    """Examples taken as pairs: chosen, rejected, chosen, rejected."""

    def __init__(self, sides: Examples) -> None:
        self.sides = sides

    def __len__(self) -> int:
        return len(self.sides) // 2

    @overload
    def __getitem__(self, index: int) -> Preference: ...
    @overload
    def __getitem__(self, index: slice) -> list[Preference]: ...
    def __getitem__(self, index: int | slice) -> Preference | list[Preference]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # counts from the end if negative, and refuses what is out of range
        return Preference(chosen=self.sides[2 * place], rejected=self.sides[2 * place + 1])
