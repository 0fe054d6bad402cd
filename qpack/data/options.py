"""How training data is read and labelled."""

from dataclasses import dataclass
from pathlib import Path

from qpack.errors import DataError

FORMATS = ("messages", "sharegpt", "prompt-completion", "alpaca", "text", "preference")
"""The formats of a row, told apart by their fields: see :mod:`qpack.data.formats`."""

LOSSES = ("assistant", "all")
"""Which tokens of a conversation are learned."""

ON_BAD_ROW = ("fail", "skip")
"""What a row that cannot be used does."""


@dataclass(frozen=True, slots=True)
class DataOptions:
    """An impossible value raises :class:`~qpack.errors.DataError` naming its field.

    Attributes:
        format: one of :data:`FORMATS`, and every row must be of it; None: told by each row's fields.
        loss: ``assistant``: what the assistant says, its end token included. ``all``: every token. Plain text is
            learned whole either way.
        chat_template: a Jinja file that takes the place of the tokenizer's own template.
        on_bad_row: ``fail``: the first row that cannot be used ends the run, named by file and line. ``skip``: it is
            left out, and counted.
    """

    format: str | None = None
    loss: str = "assistant"
    chat_template: Path | str | None = None
    on_bad_row: str = "fail"

    def __post_init__(self) -> None:
        """Refuse what is not offered."""
        for name, choices in (("format", (None, *FORMATS)), ("loss", LOSSES), ("on_bad_row", ON_BAD_ROW)):
            if getattr(self, name) not in choices:
                offered = ", ".join(str(choice) for choice in choices if choice)
                raise DataError(f"{name}: expected one of {offered}, found {getattr(self, name)!r}")
