"""kill -9 at every step that writes: the registry opens again, lists only what is whole, and has no leftovers.

A process kills itself at its n-th call that touches the file system (Python's audit events), for every n.
"""

import multiprocessing
import os
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

from qpack.adapters.adapter import Adapter
from serve.registry import Registry

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["serve.registry"])

_WRITES = ("os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir")


def _work(directory: Path, new: Path, last: int) -> None:
    """Upload a version, and take the one away that was there; be killed at the file system call number ``last``."""
    calls = count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and str(directory) in str(arguments[0])
        if (event in _WRITES or opens) and next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    with Registry.open(directory) as registry:
        old = registry.versions()
        registry.add("support", new, by="killed")
        for version in old:
            registry.remove(version.id)


def test_a_kill_at_any_step_leaves_a_whole_registry(registry: Registry, adapter: Path, other: Path) -> None:
    first = registry.add("support", adapter, by="me")
    states = set()
    for last in count():
        process = _server.Process(target=_work, args=(registry.directory, other, last))
        process.start()
        process.join()
        with Registry.open(registry.directory) as again:
            versions = again.versions()
            listed = {version.digest for version in versions}
            for version in versions:
                assert Adapter.open(version.path).rank == 4
            live = again.alias("support").live
            assert live in versions
            assert {path.name for path in (again.directory / "store").iterdir()} == listed
            assert not list((again.directory / "incoming").iterdir())
            states.add((len(versions), live == first))
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            if live != first:  # back to where it began
                again.add("support", adapter, by="me")
                again.remove(live.id)
    assert last > 10
    assert states == {(1, True), (1, False)}  # before, and after
