"""What the terminal shows of a run, on stderr: a panel that is drawn anew all the time; in a pipe a line now and then.

╭─ train ─────────────────────────────────────────────╮
│ ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╺━━━━━━━━━  96 of 120 │
│ loss           0.412  ▇▆▅▅▄▃▃▂▂▂▂▁▁▁                  │
│ learning rate  0.0002                                │
│ tokens/s       1,934                                 │
│ memory         1.83 GB                               │
│ ETA            0:48                                  │
╰─────────────────────────────────────────────────────╯
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import fmean

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qpack.sizes import format_size
from qpack.training.report import BatchHalved, EvalLog, Event, Foreseen, Listener, RunBegin, StepLog

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKS = 40
"""Characters of the curve."""
_RECENT = 20
"""Steps that the time left is reckoned from."""
_LINE_SECONDS = 5.0


@contextmanager
def panel(*, quiet: bool = False) -> Iterator[Listener]:
    """Show the run whose events the listener gets while the block lasts."""
    if quiet:
        yield lambda event: None
    elif sys.stderr.isatty():
        seen = Seen()
        with Live(console=Console(stderr=True), get_renderable=lambda: draw(seen), refresh_per_second=4):
            yield seen
    else:
        yield _Lines()


class Seen:
    """What has been told of the run so far."""

    def __init__(self) -> None:
        self.step = self.total = 0
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.last: StepLog | None = None
        self.evaluated: EvalLog | None = None
        self.best: EvalLog | None = None
        self.halved: BatchHalved | None = None
        self.foreseen: Foreseen | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case Foreseen():
                self.foreseen = event
            case RunBegin():
                self.step, self.total = event.step, event.total
            case StepLog():
                self.step, self.total, self.last = event.step, event.total, event
                self.losses.append(event.loss)
                self.seconds.append(event.seconds)
            case EvalLog():
                self.evaluated = event
                self.best = event if event.best else self.best
            case BatchHalved():
                self.halved = event

    @property
    def seconds_left(self) -> float:
        """For the steps to come, at the rate of the last ones."""
        return fmean(self.seconds[-_RECENT:]) * (self.total - self.step)


class _Lines:
    """Prints what the run needs, a line every few seconds at most, one for each evaluation, one when all is done."""

    def __init__(self) -> None:
        self._seen = Seen()
        self._last = time.monotonic()

    def __call__(self, event: Event) -> None:
        self._seen(event)
        now = time.monotonic()
        match event:
            case Foreseen():
                self._print(str(event.fit))
            case RunBegin(step=step) if step:
                self._print(f"goes on after step {step} of {event.total}")
            case StepLog() if now - self._last >= _LINE_SECONDS or event.step == event.total:
                self._last = now
                left = f", ETA {_clock(self._seen.seconds_left)}" if event.step < event.total else ""
                self._print(
                    f"step {event.step} of {event.total}, loss {event.loss:.3f}, learning rate {event.lr:g}, "
                    f"{event.tokens_per_second:,.0f} tokens/s, {format_size(event.memory)}{left}"
                )
            case EvalLog():
                self._print(f"step {event.step}, eval loss {event.loss:.3f}{', the best' if event.best else ''}")
            case BatchHalved():
                self._print(_halved(event))

    def _print(self, text: str) -> None:
        print(f"train: {text}", file=sys.stderr, flush=True)


def draw(seen: Seen) -> RenderableType:
    """The panel as of now."""
    bar = Table.grid(padding=(0, 2))
    done = f"{seen.step} of {seen.total}" if seen.total else "loading"
    bar.add_row(ProgressBar(max(seen.total, 1), seen.step, width=48, pulse=not seen.total), done)
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column(no_wrap=True)
    if last := seen.last:
        lines.add_row("loss", Text.assemble(f"{last.loss:.3f}  ", (sparkline(seen.losses), "cyan")))
        if seen.evaluated and seen.best:
            best = f"best {seen.best.loss:.3f} after step {seen.best.step}"
            lines.add_row("eval loss", f"{seen.evaluated.loss:.3f}  {best}")
        lines.add_row("learning rate", f"{last.lr:g}")
        lines.add_row("tokens/s", f"{last.tokens_per_second:,.0f}")
        lines.add_row("memory", format_size(last.memory))
        lines.add_row("ETA", _clock(seen.seconds_left))
    notes = [Text(_halved(seen.halved), style="yellow")] if seen.halved else []
    if seen.foreseen:
        notes.append(Text(str(seen.foreseen.fit), style="dim" if seen.foreseen.fit.fits else "yellow"))
    return Panel(Group(bar, lines, *notes), title="train", title_align="left", width=72)


def sparkline(values: Sequence[float]) -> str:
    """The course of ``values`` in at most 40 characters, each the mean of as many of them."""
    count = min(len(values), _SPARKS)
    edges = [index * len(values) // count for index in range(count + 1)]
    means = [fmean(values[begin:end]) for begin, end in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(_BLOCKS[round((len(_BLOCKS) - 1) * (mean - low) / span) if span else 0] for mean in means)


def _halved(event: BatchHalved) -> str:
    passes = f"{event.grad_accum} passes of {event.batch_size} sequences a step"
    return f"out of memory in step {event.step}: goes on with {passes}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
