"""The queue before the engine, in virtual time: what must hold for any traffic, and who is served when."""

import asyncio
import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_time import run

from serve.gate.queue import FairQueue, NoneSpare, Present, QueueFull


@dataclass(frozen=True)
class Request:
    """What a client does."""

    at: float
    adapter: str | None
    caller: str = ""
    seconds: float = 1.0
    """In the engine."""
    load: float = 0.0
    """Of which it takes to load the adapter, if it goes in first."""
    patience: float | None = None
    """Seconds until the client leaves, waiting or not."""
    cost: float = 1.0


@dataclass
class Traffic:
    """Runs requests through a queue and watches what goes on there."""

    queue: FairQueue
    waiting: Counter[str | None] = field(default_factory=Counter)
    inside: Counter[str | None] = field(default_factory=Counter)
    loading: Counter[str | None] = field(default_factory=Counter)
    waits: dict[Request, float] = field(default_factory=dict)
    order: list[Request] = field(default_factory=list)
    full: list[Request] = field(default_factory=list)
    gone: list[Request] = field(default_factory=list)

    async def send(self, request: Request) -> None:
        await asyncio.sleep(request.at)
        came = asyncio.get_running_loop().time()
        here = self.waiting
        self.waiting[request.adapter] += 1
        try:
            async with asyncio.timeout(request.patience):
                async with self.queue.turn(request.adapter, request.caller, cost=request.cost) as turn:
                    self.waiting[request.adapter] -= 1
                    self.inside[request.adapter] += 1
                    here = self.inside
                    self.waits[request] = asyncio.get_running_loop().time() - came
                    assert turn.waited == self.waits[request]
                    self.order.append(request)
                    self.check()
                    self.loading[request.adapter] += 1
                    try:
                        await asyncio.sleep(request.load)
                    finally:
                        self.loading[request.adapter] -= 1
                    turn.warm()
                    await asyncio.sleep(request.seconds - request.load)
        except TimeoutError:
            self.gone.append(request)
        except QueueFull:
            self.full.append(request)
        finally:
            here[request.adapter] -= 1

    def check(self) -> None:
        adapters = [adapter for adapter, count in self.inside.items() if adapter and count]
        assert sum(self.inside.values()) <= self.queue.places
        assert len(adapters) <= self.queue.slots

    async def watch(self) -> None:
        """Between the moments of the traffic: nobody waits who could go in."""
        await asyncio.sleep(0.11)
        while True:
            await asyncio.sleep(1)
            self.check()
            assert self.queue.inside == sum(self.inside.values())
            assert self.queue.waiting == sum(self.waiting.values())
            if self.queue.inside == self.queue.places:
                continue
            assert not self.waiting[None], "the base waits, and there is a place"
            waiting = {adapter for adapter, count in self.waiting.items() if adapter and count}
            adapters = {adapter for adapter, count in self.inside.items() if adapter and count}
            assert waiting <= adapters or len(adapters) == self.queue.slots, "an adapter waits: a place and a slot free"
            if waiting <= adapters:  # nobody wants the slot of another
                assert all(self.loading[adapter] for adapter in waiting), "an adapter waits that is loaded"

    async def run(self, *requests: Request) -> "Traffic":
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(self.watch())
            sent = [group.create_task(self.send(request)) for request in requests]
            await asyncio.gather(*sent)
            watcher.cancel()
        assert (self.queue.inside, self.queue.waiting, self.queue.holders) == (0, 0, [])
        return self


def traffic(queue: FairQueue, *requests: Request) -> Traffic:
    return run(Traffic(queue).run(*requests))


# Moments lie on a grid of 1, and the watcher looks between them.
requests = st.builds(
    Request,
    at=st.integers(0, 12).map(float),
    adapter=st.sampled_from([None, "a", "b", "c", "d"]),
    caller=st.sampled_from(["x", "y"]),
    seconds=st.integers(2, 6).map(float),
    load=st.integers(0, 2).map(float),
    patience=st.one_of(st.none(), st.integers(1, 9).map(float)),
    cost=st.sampled_from([1.0, 10.0]),
)


def distinct(found: list[Request]) -> list[Request]:
    """Give each a moment of its own, so that a request is a key."""
    return [Request(**{**vars(request), "at": request.at + index / 1024}) for index, request in enumerate(found)]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(requests, max_size=30).map(distinct),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([0.0, 1.0, 5.0]),
    st.sampled_from([3, 1024]),
)
def test_any_traffic(sent: list[Request], places: int, slots: int, quantum: float, limit: int) -> None:
    """Places and slots are kept, nobody waits for nothing, everybody is answered, and the queue is empty at the end."""
    seen = traffic(FairQueue(places, slots, quantum=quantum, limit=limit), *sent)
    assert {*seen.order, *seen.full, *seen.gone} == set(sent)
    if limit > len(sent):
        assert not seen.full
    patient = [request for request in sent if request.patience is None]
    assert all(request in seen.order or request in seen.full for request in patient)


@settings(max_examples=60, deadline=None)
@given(
    places=st.integers(1, 4),
    slots=st.integers(1, 3),
    floods=st.integers(1, 5),
    quantum=st.sampled_from([0.0, 2.0, 7.0]),
    longest=st.integers(1, 5),
    at=st.integers(0, 20),
    data=st.data(),
)
def test_the_wait_is_bounded(
    places: int, slots: int, floods: int, quantum: float, longest: int, at: int, data: st.DataObject
) -> None:
    """One request waits for the turns before its own, whatever the floods that others send."""
    seconds = st.integers(1, longest).map(float)
    flood = [Request(0.0, f"a{n % floods}", f"{n}", data.draw(seconds)) for n in range(40 * floods)]
    one = Request(float(at), "b")
    seen = traffic(FairQueue(places, slots, quantum=quantum), *flood, one)
    # A turn: a place comes free, a quantum, the longest answer.
    turn = longest * (slots + 1) + quantum + longest
    assert seen.waits[one] <= math.ceil(floods / slots) * turn + longest * (slots + 1)


def test_one_request_among_a_flood_with_one_slot_waits_for_a_turn_at_most() -> None:
    flood = [Request(0.0, "a", f"{n}", 1.0) for n in range(400)]
    for at in range(20):
        one = Request(at + 0.5, "b")
        seen = traffic(FairQueue(4, 1, quantum=3.0), *flood, one)
        assert seen.waits[one] <= 3.0 + 1.0
        after = seen.order.index(one) + 1
        assert seen.order[after].adapter == "a", "and the flood goes on"


def test_a_flood_keeps_its_slot_where_nobody_else_wants_it() -> None:
    flood = [Request(0.0, "a", f"{n}") for n in range(8)]
    seen = traffic(FairQueue(2, 1, quantum=0.0), *flood)
    assert sorted(seen.waits.values()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_two_floods_take_turns_of_a_quantum() -> None:
    flood = [Request(0.0, adapter, f"{n}") for n in range(20) for adapter in "ab"]
    seen = traffic(FairQueue(1, 1, quantum=3.0), *flood)
    assert "".join(request.adapter or "" for request in seen.order[:18]) == "aaabbb" * 3


def test_the_turn_of_a_heavier_adapter_is_longer() -> None:
    async def order() -> str:
        queue, entered = FairQueue(1, 1, quantum=2.0), []

        async def send(adapter: str, weight: float) -> None:
            async with queue.turn(adapter, weight=weight) as turn:
                turn.warm()
                entered.append(adapter)
                await asyncio.sleep(1)

        await asyncio.gather(
            *(send(adapter, weight) for _ in range(12) for adapter, weight in (("a", 2.0), ("b", 1.0)))
        )
        return "".join(entered)

    assert run(order()).startswith("aaaabbaaaabb")


def test_the_base_shares_places_and_needs_no_slot() -> None:
    flood = [Request(0.0, "a", f"{n}") for n in range(20)]
    seen = traffic(FairQueue(1, 1), *flood, *(Request(0.5, None, f"base {n}") for n in range(5)))
    assert Counter(request.adapter for request in seen.order[:10]) == {"a": 5, None: 5}


@pytest.mark.parametrize("adapter", ["a", None])
def test_callers_share_what_an_adapter_gets(adapter: str | None) -> None:
    flood = [Request(n / 1024, adapter, "x") for n in range(20)]
    seen = traffic(FairQueue(1, 1), *flood, *(Request(0.5 + n / 1024, adapter, "y") for n in range(5)))
    assert "".join(request.caller for request in seen.order[:12]) == "xyxyxyxyxyxx"


def test_tokens_are_shared_not_requests() -> None:
    long = [Request(n / 1024, "a", "x", cost=300.0) for n in range(10)]
    short = [Request(n / 1024, "a", "y", cost=100.0) for n in range(10)]
    seen = traffic(FairQueue(1, 1), *long, *short)
    served = Counter(request.caller for request in seen.order[:12])
    assert served == {"x": 3, "y": 9}


def test_a_heavier_caller_gets_more() -> None:
    async def served() -> Counter[str]:
        queue, entered = FairQueue(1, 0), []

        async def send(caller: str, weight: float) -> None:
            async with queue.turn(None, caller, caller_weight=weight):
                entered.append(caller)
                await asyncio.sleep(1)

        await asyncio.gather(*(send(caller, weight) for _ in range(12) for caller, weight in (("x", 3.0), ("y", 1.0))))
        return Counter(entered[:12])

    assert run(served()) == {"x": 9, "y": 3}


def test_what_was_estimated_too_low_is_paid_for_later() -> None:
    async def order() -> str:
        queue, entered = FairQueue(1, 0), []

        async def send(caller: str, actual: float) -> None:
            async with queue.turn(None, caller, cost=1.0) as turn:
                entered.append(caller)
                await asyncio.sleep(1)
                turn.settle(actual)

        await asyncio.gather(*(send(caller, actual) for _ in range(6) for caller, actual in (("x", 4.0), ("y", 1.0))))
        return "".join(entered)

    assert run(order()).startswith("xyyyyxyy")


def test_a_pause_saves_nothing_up() -> None:
    """A caller that was away while another was served a lot gets its half from now on, not all."""
    first = [Request(n / 1024, None, "x") for n in range(30)]
    later = [Request(10 + n / 1024, None, "y") for n in range(20)]
    seen = traffic(FairQueue(1, 0), *first, *later)
    assert "".join(request.caller for request in seen.order[:18]) == "x" * 10 + "yx" * 4


def test_the_wait_for_a_slot_earns_no_places() -> None:
    """An adapter that has waited for its slot while the base was served a lot shares the places from then on."""
    flood = [Request(n / 1024, adapter, f"{n}") for n in range(20) for adapter in (None, "a")]
    others = [Request(0.5 + n / 1024, "b", f"{n}") for n in range(20)]
    seen = traffic(FairQueue(1, 1, quantum=8.0), *flood, *others)
    order = "".join(request.adapter or "-" for request in seen.order)
    began = order.index("b")
    assert began >= 8
    assert order[began : began + 6] in ("b-b-b-", "bb-b-b")


def test_who_comes_back_has_saved_nothing_up_either() -> None:
    """A caller whose account was kept, since it had had more than its share, is not owed what others got meanwhile."""

    async def order() -> str:
        queue, entered = FairQueue(2, 0), []

        async def send(at: float, caller: str, seconds: float, cost: float) -> None:
            await asyncio.sleep(at)
            async with queue.turn(None, caller, cost=cost):
                entered.append(caller)
                await asyncio.sleep(seconds)

        await asyncio.gather(
            send(0.0, "y", 1, 5.0),  # y has had 5 more than x when it leaves
            send(0.5, "x", 9, 30.0),
            send(2.0, "x", 8, 1.0),  # x has had 30, and nobody has left since: the present is there
            *(send(3.0, caller, 1, 10.0) for _ in range(4) for caller in "xy"),
        )
        return "".join(entered)

    assert run(order()).startswith("yxxyxyx")


def test_swaps_are_slots_that_change_hands() -> None:
    async def swaps() -> list[Counter[object]]:
        queue, seen = FairQueue(4, 2), []

        async def ask(*adapters: str | None) -> None:
            async def stay(adapter: str | None) -> None:
                async with queue.turn(adapter) as turn:
                    turn.warm()
                    await asyncio.sleep(1)

            await asyncio.gather(*(stay(adapter) for adapter in adapters))
            seen.append(queue.swaps.copy())

        for adapters in (["a"], ["a", None], ["a", "b"], ["b"], ["c"], ["b"], ["a"]):
            await ask(*adapters)
        return seen

    first, again, second, *_, third, kept, back = run(swaps())
    assert first == again == {"a": 1}
    assert second == {"a": 1, "b": 1}
    assert third == {"a": 1, "b": 1, "c": 1}
    assert kept == third, "c has taken the slot that a left longest ago"
    assert back == {"a": 2, "b": 1, "c": 1}


def test_accounts_that_say_nothing_more_are_dropped() -> None:
    """While one request of the base goes on and on, twenty adapters come and go, and then one of them for long."""

    async def accounts() -> int:
        queue = FairQueue(2, 1)
        async with queue.turn(None):
            for number in (*range(20), 0, 0):
                async with queue.turn(f"a{number}") as turn:
                    turn.warm()
            return len(queue.present())

    assert run(accounts()) <= 3


def test_who_is_here() -> None:
    async def present() -> set[Present]:
        queue = FairQueue(1, 1)
        sent = [Request(0.0, "a", "x"), Request(0.1, "a", "y"), Request(0.2, "b")]
        others = asyncio.create_task(Traffic(queue).run(*sent))
        await asyncio.sleep(0.5)
        seen = {*queue.present()}
        await others
        return seen

    assert run(present()) == {Present(None, 0, 0, False), Present("a", 1, 1, True), Present("b", 1, 0, False)}


def test_a_load_that_hangs_takes_one_place() -> None:
    flood = [Request(0.0, "slow", f"{n}", 60.0, load=50.0) for n in range(10)]
    others = [Request(1.0, adapter, f"{n}") for n in range(10) for adapter in (None, "b")]
    seen = traffic(FairQueue(4, 2), *flood, *others)
    assert max(seen.waits[request] for request in others) <= 8
    assert [wait for wait in sorted(seen.waits[request] for request in flood)][:4] == [0, 50, 50, 50]


def test_a_failed_load_lets_the_next_one_try() -> None:
    async def failed() -> int:
        queue, tried = FairQueue(4, 1), []

        async def send() -> None:
            async with queue.turn("a"):
                tried.append(queue.inside)
                await asyncio.sleep(1)
                raise OSError

        await asyncio.gather(*(send() for _ in range(3)), return_exceptions=True)
        assert tried == [1, 1, 1]
        return queue.inside + queue.waiting

    assert run(failed()) == 0


def test_a_full_queue_turns_the_flood_away() -> None:
    """The flood has filled the queue; one request of another adapter and one of another caller still get in line."""
    flood = [Request(n / 1024, "a", "x") for n in range(12)]
    others = [Request(0.5, "b", "y"), Request(0.6, "a", "z")]
    seen = traffic(FairQueue(1, 1, limit=6), *flood, *others)
    assert set(others) < set(seen.order)
    assert len(seen.full) == 14 - 6 - 1
    assert {request.caller for request in seen.full} == {"x"}
    assert set(seen.full) == set(flood[5:]), "the newest ones"


def test_a_full_queue_says_when_to_come_back() -> None:
    async def refused() -> int:
        queue = FairQueue(2, 0, limit=10)

        async def send() -> None:
            async with queue.turn(None):
                await asyncio.sleep(8)

        for _ in range(20):  # until it knows how long an answer takes
            await asyncio.gather(send(), send())
        tasks = [asyncio.create_task(send()) for _ in range(12)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as caught:
            async with queue.turn(None):
                pass
        await asyncio.gather(*tasks)
        return caught.value.retry_after

    assert 30 <= run(refused()) <= 40


@pytest.mark.parametrize(
    ("sent", "enters"),
    [
        ([], True),
        ([Request(0.0, "a")], True),
        ([Request(0.0, "b")], False),
        ([Request(0.0, None, f"{n}") for n in range(2)], False),
        ([Request(0.0, None, f"{n}") for n in range(3)], False),
    ],
    ids=["empty", "beside its own", "no slot", "no place", "others wait"],
)
def test_a_spare_turn_makes_nobody_wait(sent: list[Request], enters: bool) -> None:
    async def spare() -> bool:
        queue = FairQueue(2, 1)
        others = asyncio.create_task(Traffic(queue).run(*sent))
        await asyncio.sleep(0.5)
        found = False
        with suppress(NoneSpare):
            async with queue.turn("a", spare=True):
                found = True
        await others
        return found

    assert run(spare()) is enters


@pytest.mark.parametrize("steps", range(4))
def test_the_moment_of_a_cancel_does_not_matter(steps: int) -> None:
    """Cancelled in the very step in which it was let in or turned away, a request leaves nothing behind."""

    async def cancelled() -> None:
        queue = FairQueue(1, 1, limit=1)

        async def stay() -> None:
            async with queue.turn("a", "x") as turn:
                turn.warm()
                await asyncio.sleep(1)

        tasks = [asyncio.create_task(stay()) for _ in range(2)]
        await asyncio.sleep(0.5)
        tasks.append(asyncio.create_task(stay()))  # turned away
        tasks[0].cancel()  # lets the second one in
        for _ in range(steps):
            await asyncio.sleep(0)
        for task in tasks[1:]:
            task.cancel()
        after = asyncio.create_task(stay())
        await asyncio.gather(*tasks, return_exceptions=True)
        await after
        assert (queue.inside, queue.waiting, queue.holders) == (0, 0, [])

    run(cancelled())


@pytest.mark.parametrize("bad", [(0, 1, 1.0, 1), (1, -1, 1.0, 1), (1, 1, -1.0, 1), (1, 1, 1.0, 0)])
def test_numbers_that_make_no_sense_are_refused(bad: tuple[int, int, float, int]) -> None:
    places, slots, quantum, limit = bad
    with pytest.raises(ValueError, match=f"places {places}"):
        FairQueue(places, slots, quantum=quantum, limit=limit)


def test_an_adapter_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="no slots"):
        run(Traffic(FairQueue(1, 0)).send(Request(0.0, "a")))
