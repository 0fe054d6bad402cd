"""The one family of exceptions that qpack raises for bad input and failed work.

A message is one line: lower case, no full stop, naming the file or tensor, what was expected and what was found.
Every class is picklable, since errors cross worker processes. Programming errors stay TypeError, ValueError and so on.
The command line prints any of these as ``error: MESSAGE`` and exits with status 1.
"""

from collections.abc import Sequence


class QpackError(Exception):
    """Base of all qpack errors."""


class CheckpointError(QpackError):
    """A model directory, index or safetensors file that is missing, malformed, unsafe or not of the kind asked for."""


class HubError(CheckpointError):
    """A model hub that cannot be reached, or refuses; the same call may succeed later."""


class AdapterError(QpackError):
    """A LoRA adapter that is malformed, of a kind that cannot be used here, or of another base."""


class MergeError(QpackError):
    """A merged model that does not compute what the base does with its adapters; it was not kept."""


class DataError(QpackError):
    """Training data, a sample text or a settings file that cannot be used; the message names file and line."""


class TrainingError(QpackError):
    """Training stopped: the loss or a gradient stopped being finite, or the base cannot be trained."""


class ServeError(QpackError):
    """The server cannot start with these options, or its engine died."""


class OutputExistsError(QpackError):
    """The output is already there and ``force`` was not given."""


class DiskFullError(QpackError):
    """The disk has no room for the output; nothing was written."""


class SeveralErrors(QpackError):
    """Several of these, each of which is to be mended. As a string: a line each."""

    def __init__(self, *errors: QpackError) -> None:
        super().__init__(*errors)
        self.errors: Sequence[QpackError] = errors

    def __str__(self) -> str:
        return "\n".join(map(str, self.errors))
