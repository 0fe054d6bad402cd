"""What the command line shows on stderr: progress while it works, one line when it fails.

On a terminal a bar with rate and time left; elsewhere (a log, a pipe) a plain line every few seconds.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qpack.sizes import format_size

Callback = Callable[[int, int], None]

_LINE_SECONDS = 5.0


@contextmanager
def progress(title: str, unit: str, *, quiet: bool = False) -> Iterator[Callback]:
    """Show the progress of the block; the callback it gets takes the ``unit``s ("bytes", "steps") done and in all."""
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with _bar(title, unit) as callback:
            yield callback
    else:
        yield _Lines(title, unit)


@contextmanager
def _bar(title: str, unit: str) -> Iterator[Callback]:
    from rich import progress as rich
    from rich.console import Console

    in_bytes = unit == "bytes"
    columns: list[rich.ProgressColumn] = [rich.TextColumn("{task.description}"), rich.BarColumn()]
    columns += [rich.DownloadColumn(), rich.TransferSpeedColumn()] if in_bytes else [rich.MofNCompleteColumn()]
    columns += [rich.TextColumn("{task.fields[rate]}"), rich.TextColumn("ETA"), rich.TimeRemainingColumn()]
    with rich.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, rate="")

        def callback(done: int, total: int) -> None:
            speed = bar.tasks[task].speed
            rate = "" if in_bytes or not speed else f"{speed:.2g} {unit}/s"
            bar.update(task, completed=done, total=total, rate=rate)

        yield callback


class _Lines:
    """Prints a line at most every few seconds, and one when all is done."""

    def __init__(self, title: str, unit: str) -> None:
        self._title, self._unit = title, unit
        self._done = 0
        self._begin = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0:
            self._begin = now  # what came before was loading
        due = now - self._last >= _LINE_SECONDS or done == total
        if done == self._done or not due:
            return
        self._done, self._last = done, now
        rate = done / max(now - self._begin, 1e-9)
        eta = f", ETA {(total - done) / rate:.0f} s" if done < total else ""
        line = f"{self._title}: {self._show(done)} of {self._show(total)}, {self._show(rate)}/s{eta}"
        print(line, file=sys.stderr, flush=True)

    def _show(self, amount: float) -> str:
        return format_size(amount) if self._unit == "bytes" else f"{amount:.3g} {self._unit}"


def configure_logging(*, verbose: bool, quiet: bool) -> None:
    """Send the log of qpack and serve to stderr: warnings with ``quiet``, debugging with ``verbose``."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("qpack")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


def verbose() -> bool:
    """Whether ``-v`` was given."""
    return logging.getLogger("qpack").isEnabledFor(logging.DEBUG)
