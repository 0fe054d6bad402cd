"""What a row of training data can be, whatever file and format it came in."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from qpack.errors import DataError

Message = dict[str, Any]
"""``{"role": ..., "content": ...}`` and what else a chat template takes: tool_calls, tool_call_id, name, reasoning."""

Tools = list[dict[str, Any]]
"""JSON schemas of the functions that the model may call."""


class BadRow(DataError):
    """A row that cannot be used: where it is, and why."""

    def __init__(self, origin: str, reason: str) -> None:
        super().__init__(origin, reason)
        self.origin = origin
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that end with the assistant's.

    ``origin`` is the ``FILE:LINE`` they come from, ``learned`` the indices of the assistant's messages to learn.
    """

    origin: str
    messages: Sequence[Message]
    learned: Sequence[int]
    tools: Tools | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text, learned as it stands."""

    origin: str
    text: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prompt and two ways to go on: the one preferred and the other. Both end with the assistant's message."""

    origin: str
    prompt: Sequence[Message]
    chosen: Sequence[Message]
    rejected: Sequence[Message]
    tools: Tools | None = None


Row = TypeVar("Row", Conversation | Document, Comparison)


@dataclass(frozen=True, slots=True)
class Rows(Generic[Row]):
    """The rows of all files, checked.

    Attributes:
        rows: in the order of the files.
        times: how often each is used in one epoch, by the weight of its file.
        paths: the files they come from.
        formats: how many rows came in each format.
        skipped: the rows left out, with ``on_bad_row="skip"``.
        left_out: fields that no format takes, and in how many rows they stood.
    """

    rows: Sequence[Row]
    times: Sequence[int]
    paths: Sequence[Path] = ()
    formats: Mapping[str, int] = field(default_factory=dict)
    skipped: Sequence[BadRow] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def split(self, share: float, seed: int) -> "tuple[Rows[Row], Rows[Row]]":
        """Set a random ``share`` of the rows apart: those to train on, and those to evaluate on, each used once.

        Whole rows move, so neither a turn nor a piece of a text is in both.

        Raises:
            DataError: one of the two would be empty.
        """
        count = round(len(self.rows) * share)
        if not 0 < count < len(self.rows):
            raise DataError(f"an evaluation share of {share} of {len(self.rows)} rows leaves one side empty")
        apart = set(random.Random(seed).sample(range(len(self.rows)), count))
        kept = [index for index in range(len(self.rows)) if index not in apart]
        train = replace(self, rows=[self.rows[i] for i in kept], times=[self.times[i] for i in kept])
        return train, replace(self, rows=[self.rows[i] for i in sorted(apart)], times=[1] * count, skipped=())
