"""Runs of `qpack.train` in processes of their own, which can be killed at any moment.

Each is forked off a server that has imported torch and the rest already, so that a process costs a second, not ten.
They compute in one thread: the tiny model gains nothing by more, and loses much where the processor has other work.
"""

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

from qpack.training import Event, RunBegin, StepLog, TrainSettings, train

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["qpack.training.loop", "qpack.data.encoding", "qpack.loading.adapters", "runs"])


def finish(base: Path, data: Path, output: Path, settings: TrainSettings) -> int:
    """Run to the end, and return the step that the run began or went on after."""
    receiver, sender = _server.Pipe(duplex=False)
    process = _server.Process(target=_run, args=(base, data, output, settings, sender.send))
    process.start()
    begin = next(event for event in iter(receiver.recv, None) if isinstance(event, RunBegin))
    process.join()
    assert process.exitcode == 0
    return begin.step


def kill(base: Path, data: Path, output: Path, settings: TrainSettings, step: int, delay: float) -> None:
    """Run, and be killed ``delay`` seconds after ``step`` has been told of, wherever that is."""
    process = _server.Process(target=_run, args=(base, data, output, settings, _Killer(step, delay)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def contents(output: Path) -> dict[str, bytes]:
    """What is in a directory that `qpack.train` wrote, but for what tells of seconds."""
    return {
        path.name: path.read_bytes() for path in output.iterdir() if path.name not in ("metrics.jsonl", "report.html")
    }


class _Killer:
    def __init__(self, step: int, delay: float) -> None:
        self.step, self.delay = step, delay

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepLog) and event.step == self.step:
            if self.delay:
                threading.Timer(self.delay, _kill_self).start()
            else:
                _kill_self()


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _run(base: Path, data: Path, output: Path, settings: TrainSettings, on_event: Any) -> None:
    import torch

    torch.set_num_threads(1)
    train(base, data, output, settings, on_event=on_event)
