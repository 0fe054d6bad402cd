"""Which versions are in the engine's memory, and for how long.

A request takes a lease on its version for as long as it runs. The first lease loads the version: a thread copies its
files to memory (`serve.staging`), then the engine reads the copy beside its steps (`serve.engine_adapters`); the others
wait for the same load. While a version has a lease neither its weights nor its files go away. Without one it stays
until the room is needed, the least recently used first, a pinned one last; one that the registry has given up goes as
soon as its last lease ends.

There is room for ``capacity`` versions, vLLM's ``max_cpu_loras``. vLLM would make room itself, but in the middle of a
step, and it would read a version back in the same way; so it is never asked to hold more.

All that a failed load leaves behind is its error, for those who wait; the next lease tries anew.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, TypeVar

from prometheus_client import Counter, Gauge, Histogram

from qpack.errors import ServeError
from serve.staging import Stage

T = TypeVar("T")

# Storage that takes longer is broken, not slow.
LOAD_SECONDS = 120.0

# Series of versions that are not in memory would pile up: what is counted is counted by name.
RESIDENT = Gauge("qpack_adapters_resident", "1 for each version in the engine's memory", ("adapter", "version"))
LOADS = Histogram(
    "qpack_adapter_load_seconds",
    "From the first lease of a version to its use",
    ("adapter",),
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, LOAD_SECONDS),
)
FAILURES = Counter("qpack_adapter_load_failures", "Loads that failed", ("adapter",))
EVICTIONS = Counter("qpack_adapter_evictions", "Versions taken out of the engine's memory for others", ("adapter",))


class Version(Protocol):
    """What is asked of a registry's version: an id that stands for the same weights for good."""

    @property
    def id(self) -> str: ...
    @property
    def pinned(self) -> bool: ...


class Engine(Protocol):
    """What is asked of the engine: `serve.engine_adapters.EngineAdapters`."""

    async def load(self, name: str, path: Path) -> None: ...
    async def unload(self, name: str) -> None: ...


@dataclass(eq=False)
class _Resident:
    """A version in the engine, or on its way in or out."""

    version: Version
    load: asyncio.Task[None]
    leases: int = 0
    used: float = field(default_factory=time.monotonic)
    retired: bool = False
    leaving: bool = False

    @property
    def idle(self) -> bool:
        return self.loaded and not self.leases and not self.leaving

    @property
    def loaded(self) -> bool:
        return self.load.done() and self.load.exception() is None


class Residency:
    """The versions in one engine. For one event loop.

    Args:
        engine: where they go.
        stage: where their files are copied to.
        hold: where their files are, for the length of a block (`serve.registry.Registry.hold`).
        capacity: how many the engine has room for.
    """

    def __init__(
        self, engine: Engine, stage: Stage, hold: Callable[[Any], AbstractContextManager[Path]], capacity: int
    ) -> None:
        self._engine, self._stage, self._hold, self.capacity = engine, stage, hold, capacity
        self._residents: dict[str, _Resident] = {}
        self._places = 0  # of `capacity`, taken
        self._reading = asyncio.Lock()  # one at a time: each takes time from the engine's steps
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def resident(self) -> list[str]:
        """The ids of the versions that a request could use at once, the most recently used last."""
        ready = [one for one in self._residents.values() if one.loaded and not one.leaving]
        return [one.version.id for one in sorted(ready, key=lambda one: one.used)]

    @asynccontextmanager
    async def lease(self, version: Version) -> AsyncIterator[None]:
        """Have the version in the engine for the length of the block; wait for that, if need be.

        Raises:
            ServeError: if it cannot be loaded.
        """
        while (resident := self._residents.get(version.id)) is not None and resident.leaving:
            await self._changed.wait()
        if resident is None:
            resident = _Resident(version, self._start(self._load(version)))
            self._residents[version.id] = resident
        resident.leases += 1
        try:
            # One that gives up waiting does not end the load, which others may wait for.
            await asyncio.shield(resident.load)
            yield
        finally:
            resident.leases -= 1
            resident.used = time.monotonic()
            if resident.retired and resident.idle:
                self._let_go(resident)
            self._wake()

    def follow(self, versions: Iterable[Version]) -> None:
        """Take note of what the registry holds now: load what is pinned, let go of what is gone."""
        known = {version.id: version for version in versions}
        for name, resident in self._residents.items():
            resident.retired = name not in known
            resident.version = known.get(name, resident.version)
            if resident.retired and resident.idle:
                self._let_go(resident)
        for name, version in known.items():
            if version.pinned and name not in self._residents:
                self._start(self._warm(version))

    async def _warm(self, version: Version) -> None:
        with suppress(ServeError):  # counted; whoever asks for the version will be told
            async with self.lease(version):
                pass

    async def _load(self, version: Version) -> None:
        name, began = version.id, time.monotonic()
        adapter, _, digits = name.partition("@")
        try:
            try:
                async with asyncio.timeout(LOAD_SECONDS):
                    path = await _in_thread(lambda: self._copy(version))
            except TimeoutError as error:
                raise ServeError(f"adapter {name}: its files could not be read in {LOAD_SECONDS:.0f} s") from error
            except OSError as error:
                raise ServeError(f"adapter {name}: {error.filename}: {error.strerror or error}") from error
            await self._take_place()
            try:
                async with self._reading:
                    await self._engine.load(name, path)
            except BaseException:
                self._places -= 1
                raise
        except BaseException:
            FAILURES.labels(adapter).inc()
            self._stage.drop(name)
            del self._residents[name]
            self._wake()
            raise
        LOADS.labels(adapter).observe(time.monotonic() - began)
        RESIDENT.labels(adapter, digits).set(1)

    def _copy(self, version: Version) -> Path:
        with self._hold(version) as source:
            return self._stage.put(version.id, source)

    async def _take_place(self) -> None:
        """Take one of the places in the engine; make one free, or wait until one can be."""
        while self._places == self.capacity:
            idle = [resident for resident in self._residents.values() if resident.idle]
            if idle:
                oldest = min(idle, key=lambda resident: (resident.version.pinned, resident.used))
                EVICTIONS.labels(oldest.version.id.partition("@")[0]).inc()
                await self._let_go(oldest)
            else:
                await self._changed.wait()
        self._places += 1

    def _let_go(self, resident: _Resident) -> asyncio.Task[None]:
        """Begin to take an idle version out; a lease that comes meanwhile waits and loads it anew."""
        resident.leaving = True
        return self._start(self._unload(resident.version.id))

    async def _unload(self, name: str) -> None:
        adapter, _, digits = name.partition("@")
        RESIDENT.remove(adapter, digits)
        await self._engine.unload(name)
        await _in_thread(lambda: self._stage.drop(name))
        del self._residents[name]
        self._places -= 1
        self._wake()

    def _wake(self) -> None:
        """Let all that wait for a change look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine for its own sake; what it raises is for those that await it, if anyone does."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        task.add_done_callback(self._tasks.discard)
        return task


def _in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Run in a daemon thread of its own: one that a dead disk holds for ever delays neither others nor the exit."""
    result: Future[T] = Future()

    def run() -> None:
        result.set_running_or_notify_cancel()
        try:
            value = work()
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(value)

    Thread(target=run, name="qpack-files", daemon=True).start()
    return asyncio.wrap_future(result)
