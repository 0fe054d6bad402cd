"""Leases, room and the registry's changes, with an engine that only notes what it is asked.

What the real engine does with the same calls is in test_endpoint.py.
"""

import asyncio
import os
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from qpack.errors import ServeError
from serve import residency
from serve.residency import Residency
from serve.staging import Stage, open_stage


@dataclass(frozen=True)
class Stored:
    id: str
    path: Path
    pinned: bool = False


@contextmanager
def hold(version: Stored) -> Iterator[Path]:
    yield version.path


class NotingEngine:
    """Holds names; fails for those told so. Never more than it has room for, or a lease would break."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: dict[str, Path] = {}
        self.log: list[str] = []
        self.broken: set[str] = set()
        self.read: list[Path] = []
        self.reading = False

    async def load(self, name: str, path: Path) -> None:
        assert not self.reading, "one at a time"
        self.reading = True
        await asyncio.sleep(0.001)
        self.reading = False
        self.read.append(path)
        assert (path / "adapter_config.json").is_file()
        if name in self.broken:
            raise ServeError(f"adapter {name}: the engine cannot read it")
        self.held[name] = path
        self.log.append(f"+{name}")
        assert len(self.held) <= self.capacity

    async def unload(self, name: str) -> None:
        await asyncio.sleep(0.001)
        del self.held[name]
        self.log.append(f"-{name}")


@pytest.fixture
def stage() -> Iterator[Stage]:
    with open_stage() as stage:
        yield stage


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Stored]:
    for name in "abcd":
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(name)
    return {name: Stored(f"{name}@1", tmp_path / name) for name in "abcd"}


def test_a_version_is_loaded_once_for_all_who_ask(stage: Stage, stored: dict[str, Stored]) -> None:
    async def run() -> None:
        engine = NotingEngine(2)
        room = Residency(engine, stage, hold, 2)

        async def ask() -> None:
            async with room.lease(stored["a"]):
                assert "a@1" in engine.held

        await asyncio.gather(*(ask() for _ in range(5)))
        assert engine.log == ["+a@1"]
        assert room.resident == ["a@1"]
        assert REGISTRY.get_sample_value("qpack_adapters_resident", {"adapter": "a", "version": "1"}) == 1

    asyncio.run(run())


def test_what_is_counted(stage: Stage, stored: dict[str, Stored]) -> None:
    def figure(name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(f"qpack_adapter{name}", labels)

    async def run() -> None:
        engine = NotingEngine(1)
        engine.broken = {"counted-2@1"}
        room = Residency(engine, stage, hold, 1)
        for number in range(3):
            with suppress(ServeError):
                async with room.lease(Stored(f"counted-{number}@1", stored["a"].path)):
                    pass
        room.follow([])  # that is no eviction
        await asyncio.sleep(0.05)

    asyncio.run(run())
    names = [f"counted-{number}" for number in range(3)]
    assert [figure("_load_seconds_count", adapter=name) for name in names] == [1, 1, None]
    assert [figure("_load_failures_total", adapter=name) for name in names] == [None, None, 1]
    assert [figure("_evictions_total", adapter=name) for name in names] == [1, 1, None]
    assert [figure("s_resident", adapter=name, version="1") for name in names] == [None] * 3


def test_the_least_recently_used_goes_and_a_pinned_one_last(stage: Stage, stored: dict[str, Stored]) -> None:
    async def run() -> None:
        engine = NotingEngine(2)
        room = Residency(engine, stage, hold, 2)
        for name in "abacad":
            async with room.lease(stored[name]):
                pass
        assert engine.log == ["+a@1", "+b@1", "-b@1", "+c@1", "-c@1", "+d@1"]
        room.follow([*stored.values(), Stored("a@1", stored["a"].path, pinned=True)])
        for name in "dbcd":
            async with room.lease(stored[name]):
                assert "a@1" in engine.held

    asyncio.run(run())


def test_a_leased_version_keeps_its_place_and_its_files(stage: Stage, stored: dict[str, Stored]) -> None:
    async def run() -> None:
        engine = NotingEngine(1)
        room = Residency(engine, stage, hold, 1)
        async with AsyncExitStack() as leases:
            await leases.enter_async_context(room.lease(stored["a"]))
            room.follow([stored["b"]])  # `a` is removed while a request runs on it
            waiting = asyncio.create_task(leases.enter_async_context(room.lease(stored["b"])))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            assert [*engine.held] == ["a@1"]
            assert (engine.held["a@1"] / "adapter_config.json").read_text() == "a"
        copy = engine.held["a@1"]
        async with room.lease(stored["b"]):
            assert [*engine.held] == ["b@1"]
            assert not copy.exists()

    asyncio.run(run())


def test_a_version_that_is_gone_leaves_when_its_last_request_has_ended(stage: Stage, stored: dict[str, Stored]) -> None:
    async def run() -> None:
        engine = NotingEngine(3)
        room = Residency(engine, stage, hold, 3)
        async with room.lease(stored["b"]):
            async with room.lease(stored["a"]):
                room.follow([stored["b"]])
            await asyncio.sleep(0.05)
            assert [*engine.held] == ["b@1"]
        async with room.lease(stored["a"]):  # resolved before it was removed
            assert {*engine.held} == {"a@1", "b@1"}

    asyncio.run(run())


def test_a_version_that_is_on_its_way_out_is_loaded_anew(stage: Stage, stored: dict[str, Stored]) -> None:
    async def run() -> None:
        engine = NotingEngine(2)
        room = Residency(engine, stage, hold, 2)
        async with room.lease(stored["a"]):
            pass
        room.follow([])  # begins to take it out
        async with room.lease(stored["a"]):
            assert engine.log == ["+a@1", "-a@1", "+a@1"]
            assert (engine.held["a@1"] / "adapter_config.json").read_text() == "a"

    asyncio.run(run())


def test_pinned_versions_are_loaded_before_anyone_asks(stage: Stage, stored: dict[str, Stored]) -> None:
    async def run() -> None:
        engine = NotingEngine(2)
        room = Residency(engine, stage, hold, 2)
        room.follow([stored["a"], Stored("b@1", stored["b"].path, pinned=True)])
        await asyncio.sleep(0.05)
        assert room.resident == ["b@1"]

    asyncio.run(run())


def test_failures_are_told_to_all_who_wait_and_leave_nothing(
    stage: Stage, stored: dict[str, Stored], tmp_path: Path
) -> None:
    async def run() -> None:
        engine = NotingEngine(1)
        engine.broken = {"a@1"}
        room = Residency(engine, stage, hold, 1)

        async def ask(version: Stored) -> None:
            async with room.lease(version):
                raise AssertionError("not loaded")

        missing = Stored("gone@1", tmp_path / "gone")
        results = await asyncio.gather(*(ask(one) for one in [stored["a"]] * 3 + [missing]), return_exceptions=True)
        messages = [str(error) for error in results if isinstance(error, ServeError)]
        assert messages[:3] == ["adapter a@1: the engine cannot read it"] * 3
        assert messages[3] == f"adapter gone@1: {missing.path}: No such file or directory"
        assert room.resident == []
        assert not engine.read[0].exists(), "no copy is left"
        engine.broken = set()
        async with room.lease(stored["a"]):  # the place is free again, and so is the name
            assert [*engine.held] == ["a@1"]

    asyncio.run(run())


def test_slow_storage_holds_up_its_own_version_only(
    stage: Stage, stored: dict[str, Stored], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIFO without a writer: whoever opens it waits as on a disk that does not answer."""
    monkeypatch.setattr(residency, "LOAD_SECONDS", 1.0)
    fifo = stored["a"].path / "adapter_model.safetensors"
    os.mkfifo(fifo)

    async def run() -> None:
        engine = NotingEngine(1)
        room = Residency(engine, stage, hold, 1)
        stalled = asyncio.create_task(room.lease(stored["a"]).__aenter__())
        async with room.lease(stored["b"]):
            assert not stalled.done()
        with pytest.raises(ServeError, match="adapter a@1: its files could not be read in 1 s"):
            await stalled

    asyncio.run(run())


def test_clients_that_give_up_leave_the_load_to_others(stage: Stage, stored: dict[str, Stored]) -> None:
    async def run() -> None:
        engine = NotingEngine(1)
        room = Residency(engine, stage, hold, 1)
        impatient = asyncio.create_task(room.lease(stored["a"]).__aenter__())
        await asyncio.sleep(0)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        async with room.lease(stored["a"]):
            assert engine.log == ["+a@1"]
        async with room.lease(stored["b"]):  # no lease was left behind
            assert [*engine.held] == ["b@1"]

    asyncio.run(run())


def test_many_requests_for_more_versions_than_fit(stage: Stage, stored: dict[str, Stored]) -> None:
    async def run() -> None:
        engine = NotingEngine(2)
        room = Residency(engine, stage, hold, 2)

        async def ask(name: str) -> None:
            async with room.lease(stored[name]):
                for _ in range(3):
                    assert f"{name}@1" in engine.held
                    await asyncio.sleep(0.0005)

        async with asyncio.timeout(20):
            await asyncio.gather(*(ask("abcd"[(i * 7 + i // 5) % 4]) for i in range(200)))
        assert len(engine.held) == 2

    asyncio.run(run())
