"""The parent process: keeps the port, and a serving process behind it.

While no serving process is ready, it answers itself that one is coming (`serve.waiting`). One that ends unasked is
started again after a pause that doubles; what was served is served again, for the registry is on disk. It gives up if
the first one never gets ready, which another try would not change, and if they keep dying.

SIGTERM or SIGINT: the serving process lets nobody in any more, finishes its streams, and ends. A second one: it ends.

This process imports neither torch nor vLLM: it lives through what they may do, and weighs little.
"""

import asyncio
import json
import logging
import os
import pickle
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import psutil

from qpack.errors import ServeError
from serve.control import DRAIN
from serve.waiting import Waiting

logger = logging.getLogger("qpack.serve")

# So many deaths within so many seconds are too many.
DEATHS = 5
WINDOW_SECONDS = 600.0

FIRST_PAUSE_SECONDS = 1.0
_LAST_PAUSE_SECONDS = 30.0

_PROGRESS_SECONDS = 10.0
# For the engine to free its memory, once the last stream has ended.
_SHUTDOWN_SECONDS = 30.0
# For what has cleaned up after it so far to be done, once it is gone.
_CLEANUP_SECONDS = 5.0
_TRACKER = "multiprocessing.resource_tracker"


class Supervisor:
    """Runs serving processes one after the other, until a signal ends the last one.

    Args:
        command: starts one; it is given the descriptors of the listening socket and of its control (`serve.control`).
        sent: what it is told first, by pickle.
        listener: the bound socket.
        drain_timeout: seconds that streams may take to end after the first signal.
        on_ready: called each time that one is ready.
    """

    def __init__(
        self,
        command: Sequence[str],
        sent: Any,
        listener: socket.socket,
        *,
        drain_timeout: float,
        on_ready: Callable[[], None],
    ) -> None:
        self._command, self._sent, self._listener = command, sent, listener
        self._drain_timeout, self._on_ready = drain_timeout, on_ready
        self._stop, self._now = asyncio.Event(), asyncio.Event()  # after one signal, after two

    async def run(self) -> None:
        """Serve until a signal.

        Raises:
            ServeError: if the first process never gets ready, or too many have died.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._signal)
        waiting = Waiting(self._listener)
        was_ready = False
        deaths: deque[float] = deque()
        try:
            while not self._stop.is_set():
                await waiting.start()
                child = await Child.start(self._command, self._sent, self._listener)
                try:
                    await self._loading(child)
                    if child.ready.is_set() and not self._stop.is_set():
                        was_ready = True
                        waiting.stop()
                        self._on_ready()
                        await _first(child.ended, self._stop)
                    if self._stop.is_set():
                        return await self._drain(child)
                finally:
                    await child.kill()
                if not was_ready:
                    raise ServeError(child.reason)
                deaths.append(time.monotonic())
                while deaths[-1] - deaths[0] > WINDOW_SECONDS:
                    deaths.popleft()
                if len(deaths) == DEATHS:
                    raise ServeError(f"{child.reason}; that was {DEATHS} times in {WINDOW_SECONDS / 60:.0f} minutes")
                await waiting.start()
                pause = min(FIRST_PAUSE_SECONDS * 2 ** (len(deaths) - 1), _LAST_PAUSE_SECONDS)
                logger.error("%s; starting it again in %.0f s", child.reason, pause)
                await _first(self._stop, timeout=pause)
        finally:
            waiting.stop()

    async def _loading(self, child: "Child") -> None:
        began = time.monotonic()
        while not await _first(child.ready, child.ended, self._stop, timeout=_PROGRESS_SECONDS):
            logger.info("loading engine ... %.0f s", time.monotonic() - began)

    async def _drain(self, child: "Child") -> None:
        if not child.ready.is_set():
            return
        child.drain()
        if not await _first(child.ended, self._now, timeout=self._drain_timeout + _SHUTDOWN_SECONDS):
            logger.warning("the engine did not end and was killed")

    def _signal(self) -> None:
        (self._now if self._stop.is_set() else self._stop).set()


class Child:
    """A serving process, in a process group with all that it starts."""

    def __init__(self, process: asyncio.subprocess.Process, control: asyncio.StreamWriter) -> None:
        self._process, self._control = process, control
        self.ready, self.ended = asyncio.Event(), asyncio.Event()
        self._reason: str | None = None
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, command: Sequence[str], sent: Any, listener: socket.socket) -> "Child":
        """Start one, and tell it what to do."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *command,
                str(listener.fileno()),
                str(theirs.fileno()),
                pass_fds=(listener.fileno(), theirs.fileno()),
                start_new_session=True,  # Ctrl-C is for the parent alone
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        child = cls(process, writer)
        writer.write(pickle.dumps(sent))
        child._watching = asyncio.create_task(child._watch(reader))
        return child

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            async for line in reader:
                match json.loads(line):
                    case {"ready": True}:
                        self.ready.set()
                    case {"failed": str(reason)}:
                        self._reason = reason
        await self._process.wait()
        self.ended.set()

    @property
    def reason(self) -> str:
        """Why it has ended."""
        return self._reason or f"the engine died (status {self._process.returncode}); what it wrote last says why"

    def drain(self) -> None:
        """Ask it to end when its streams have."""
        self._control.write(DRAIN)

    async def kill(self) -> None:
        """End it, and whatever it has started; those last that clean up after the others."""
        with suppress(ProcessLookupError):
            if not self.ended.is_set():
                _kill_all_but_trackers(self._process.pid)
            end = time.monotonic() + _CLEANUP_SECONDS
            while time.monotonic() < end:
                os.killpg(self._process.pid, 0)
                await asyncio.sleep(0.05)
            os.killpg(self._process.pid, signal.SIGKILL)
        await self.ended.wait()
        self._control.close()


def _kill_all_but_trackers(group: int) -> None:
    """Kill a process group, but for multiprocessing's trackers: once the others are gone, they remove what was shared.

    vLLM's engine and its workers share 160 MB of ``/dev/shm`` each time, which nobody else would ever remove.
    """
    for process in psutil.process_iter(["cmdline"]):
        with suppress(OSError):
            tracker = any(_TRACKER in argument for argument in process.info["cmdline"] or ())
            if os.getpgid(process.pid) == group and not tracker:
                os.kill(process.pid, signal.SIGKILL)


async def _first(*events: asyncio.Event, timeout: float | None = None) -> bool:
    """Wait until one of the events is set; return whether one was in time."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    done, pending = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    return bool(done)
