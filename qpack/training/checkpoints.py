"""Checkpoints of a run: whole or not there, whatever ends the process while one is written or deleted.

A checkpoint is a directory ``checkpoint-STEP`` as transformers' Trainer writes it: the adapter, and the state of
optimizer, schedule, random numbers and Trainer. It is written under another name, brought to disk, and then renamed; to
be deleted it is renamed first. So what has the name is complete.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qpack.output import sync, sync_directory

_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = "unfinished"


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints in one directory, which is made when the first is saved."""

    directory: Path
    keep: int
    """How many of the last ones stay."""

    def steps(self) -> list[int]:
        """After which steps there is a checkpoint, in order."""
        names = [path.name for path in self.directory.iterdir()] if self.directory.exists() else []
        return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))

    def path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` is."""
        return self.directory / f"checkpoint-{step}"

    def latest(self) -> Path | None:
        """The checkpoint that a run goes on from."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    @contextmanager
    def saving(self) -> Iterator[Path]:
        """Yield an empty directory; the checkpoint that the block writes into it is published when the block ends."""
        unfinished = self.directory / _UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        sync(unfinished)
        for checkpoint in unfinished.iterdir():
            self._delete(self.directory / checkpoint.name)  # there already if a resumed run took another way
            checkpoint.rename(self.directory / checkpoint.name)
        unfinished.rmdir()
        sync_directory(self.directory)

    def drop_old(self, best: int | None) -> None:
        """Delete all but the last ``keep`` and the one after step ``best``."""
        for step in self.steps()[: -self.keep]:
            if step != best:
                self._delete(self.path(step))

    def _delete(self, checkpoint: Path) -> None:
        if checkpoint.exists():
            doomed = checkpoint.rename(self.directory / f"{_UNFINISHED}-{checkpoint.name}")
            shutil.rmtree(doomed)
