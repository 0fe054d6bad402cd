"""Errors that are gathered, so that whoever has made several mistakes is told of all of them at once."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from qpack.errors import QpackError, ServeError, SeveralErrors


class Problems:
    """What was found wrong so far, in the order of its finding."""

    def __init__(self) -> None:
        self._found: list[QpackError] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Go on after the block with what it raises written down; what else stands in the block is not done then."""
        try:
            yield
        except SeveralErrors as error:
            self.note(error.errors)
        except QpackError as error:
            self.note([error])
        except OSError as error:
            self.note([ServeError(f"{error.filename}: {error.strerror}" if error.filename else str(error))])

    def note(self, errors: Iterable[QpackError]) -> None:
        """Write errors down that nobody has raised."""
        self._found.extend(errors)

    def raise_found(self) -> None:
        """Do nothing if nothing is wrong.

        Raises:
            QpackError: the only one, as it is, or `SeveralErrors`.
        """
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            raise SeveralErrors(*self._found)
