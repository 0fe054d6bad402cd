"""``metrics.jsonl``: a line for each step and each evaluation of a run, in order, each of them once.

    {"step": 3, "loss": 1.52, "lr": 0.0002, "grad_norm": 0.41, "tokens": 2048, ...}
    {"step": 3, "eval_loss": 1.61}

A step is on disk before the next one begins, so that no checkpoint knows a step that the file doesn't. What a run did
after its last checkpoint is cut off when the same command goes on from there, and written anew.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qpack.training.report import EvalLog, Event, RunBegin, StepLog

METRICS_NAME = "metrics.jsonl"


@contextmanager
def recording(path: Path, checkpoints: Path) -> Iterator["Metrics"]:
    """Yield the listener that writes the file at ``path``.

    It stays when the run ends early, for the one that goes on from what is in ``checkpoints``. Where nothing is, the
    next run begins anew, and nothing is left.
    """
    try:
        yield Metrics(path)
    except BaseException:
        if not checkpoints.exists() or not any(checkpoints.iterdir()):
            path.unlink(missing_ok=True)
        raise


class Metrics:
    """A listener that writes the file at ``path``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, event: Event) -> None:
        """Take an event of the run."""
        match event:
            case RunBegin():
                self._cut(event.step)
            case StepLog():
                values = asdict(event)
                del values["total"]
                self._append({name: value for name, value in values.items() if value is not None})
            case EvalLog():
                self._append({"step": event.step, "eval_loss": event.loss})
            case _:
                pass

    def rows(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return read_metrics(self._path)

    def _cut(self, step: int) -> None:
        rows = [row for row in self.rows() if row["step"] <= step] if step else []
        partial = self._path.with_suffix(".new")
        partial.write_text("".join(_line(row) for row in rows), encoding="utf-8")
        partial.rename(self._path)

    def _append(self, row: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, but for a last one that a power cut left unfinished."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
