"""Who goes next into the engine: adapters share it evenly, and the callers of one adapter share what it gets.

Two things are scarce. **Places**: at most ``places`` requests are in the engine. **Slots**: at most ``slots`` different
adapters are; the base needs none.

Places are given by start-time fair queueing (Goyal, Vin, Cheng: "Start-time Fair Queueing", SIGCOMM 1996) with tokens
for packets, as in "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024). Who has had the least, divided
by its weight, goes next: first among adapters, then among the callers of that adapter. A request is charged an estimate
when it goes in and the difference when it comes out. Who was away starts at the present and has saved up nothing.

Slots are given in turns. An adapter keeps its slot while nobody waits for one. If another adapter does, requests are
let in until ``quantum`` seconds (times the adapter's weight) after the first of this turn; those inside end, and the
slot goes to the adapter that has waited longest. One that waits alone behind a flood waits for a turn at most: a
quantum and the longest answer. No timers: the queue moves when a request comes or goes.

The first request of a turn goes in alone until it says that its adapter is loaded: a load that hangs takes one place.

A full queue turns away the newest of the longest line: that is the flood's own.

Refused: preemption. vLLM can set a request aside only by computing it again.
"""

import asyncio
import math
from collections import Counter, deque
from collections.abc import AsyncIterator, Hashable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


class QueueFull(Exception):
    """Too many requests wait, most of them in this line. ``retry_after`` is in whole seconds, at least 1."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests are waiting, retry after {retry_after} s")
        self.retry_after = retry_after


class NoneSpare(Exception):
    """A turn was asked for only if nobody would have to wait for it, and somebody would."""


@dataclass(slots=True, eq=False)
class _Waiter:
    """A request in line; ``admitted`` is done when it may go in."""

    cost: float
    admitted: asyncio.Future[None]


@dataclass(slots=True, eq=False)
class _Line:
    """One caller's requests for one adapter, first come first served."""

    served: float
    weight: float = 1.0
    waiting: deque[_Waiter] = field(default_factory=deque)
    inside: int = 0


@dataclass(slots=True, eq=False)
class _Flow:
    """One adapter, or the base, and the lines before it."""

    adapter: Hashable
    served: float
    """Virtual time: tokens over weight."""
    weight: float = 1.0
    lines: dict[Hashable, _Line] = field(default_factory=dict)
    now: float = 0.0
    """What the line that went in last had been served: the present among the lines."""
    inside: int = 0
    cold: bool = False
    """Has a slot, and none of its requests has found the adapter loaded yet."""
    began: float | None = None
    """When the first request of this turn went in."""

    @property
    def waiting(self) -> bool:
        return any(line.waiting for line in self.lines.values())


@dataclass(frozen=True, slots=True)
class Present:
    """What one adapter, or the base, has in the queue at one moment."""

    adapter: Hashable
    waiting: int
    inside: int
    has_slot: bool


class Turn:
    """A request's stay in the engine."""

    def __init__(self, queue: "FairQueue", flow: _Flow, line: _Line, cost: float, waited: float) -> None:
        self._queue, self._flow, self._line, self._cost = queue, flow, line, cost
        self.waited = waited
        """Seconds in line."""

    def warm(self) -> None:
        """Say that the adapter is loaded, so that others of its requests may follow."""
        self._flow.cold = False
        self._queue._move()

    def settle(self, cost: float) -> None:
        """Replace the estimated cost by the actual one."""
        self._flow.served += (cost - self._cost) / self._flow.weight
        self._line.served += (cost - self._cost) / self._line.weight
        self._cost = cost


class FairQueue:
    """Lets requests in as the module says. For one event loop, whose time it goes by.

    Args:
        places: requests in the engine at a time.
        slots: different adapters in the engine at a time; 0 where only the base is served.
        quantum: seconds that an adapter may let requests in while another waits for its slot.
        limit: requests that may wait.
    """

    def __init__(self, places: int, slots: int, *, quantum: float = 2.0, limit: int = 1024) -> None:
        if places < 1 or slots < 0 or quantum < 0 or limit < 1:
            raise ValueError(f"places {places}, slots {slots}, quantum {quantum}, limit {limit}")
        self.places, self.slots, self.quantum, self.limit = places, slots, quantum, limit
        self.inside = 0
        """Requests in the engine."""
        self.waiting = 0
        """Requests in line."""
        self._flows: dict[Hashable, _Flow] = {}
        self._holders: dict[_Flow, None] = {}
        self._without_slot: dict[_Flow, None] = {}  # flows with requests in line, in the order of their turns
        self._now = 0.0
        self._stay = 1.0  # mean seconds in the engine, of about the last ten requests
        self._seated: dict[Hashable, None] = {}
        self.swaps: Counter[Hashable] = Counter()
        """How often each adapter was given a slot that it was not in before."""

    @property
    def holders(self) -> list[Hashable]:
        """Adapters that have a slot."""
        return [flow.adapter for flow in self._holders]

    def present(self) -> list[Present]:
        """Who is here now, the base always, so that there is a sum; from any thread."""
        flows = self._flows.copy()
        flows.setdefault(None, _Flow(None, 0.0))
        return [
            Present(
                flow.adapter,
                sum(len(line.waiting) for line in [*flow.lines.values()]),
                flow.inside,
                flow in self._holders,
            )
            for flow in flows.values()
        ]

    @asynccontextmanager
    async def turn(
        self,
        adapter: Hashable | None,
        caller: Hashable = None,
        *,
        cost: float = 1.0,
        weight: float = 1.0,
        caller_weight: float = 1.0,
        spare: bool = False,
    ) -> AsyncIterator[Turn]:
        """Wait in line, then stay in the engine for the block. ``adapter`` None is the base.

        Cancel it to leave the line, for example by `asyncio.timeout`.

        Args:
            cost: tokens that the request will take, as far as one can tell.
            spare: go in at once, or not at all.

        Raises:
            QueueFull: the line is too long, now or because of requests of others that came later.
            NoneSpare: see ``spare``.
            ValueError: for an adapter where there are no slots.
        """
        if adapter is not None and not self.slots:
            raise ValueError(f"adapter {adapter!r}: the queue has no slots")
        loop = asyncio.get_running_loop()
        came = loop.time()
        if spare and self.waiting:
            raise NoneSpare
        flow, line = self._line(adapter, caller)
        flow.weight, line.weight = weight, caller_weight
        waiter = _Waiter(cost, loop.create_future())
        line.waiting.append(waiter)
        self.waiting += 1
        self._move()
        if spare and not waiter.admitted.done():
            self._step_out(line, waiter)
            raise NoneSpare
        self._shorten(line)
        try:
            await waiter.admitted
        except BaseException:
            if waiter in line.waiting:
                self._step_out(line, waiter)
            elif not waiter.admitted.cancelled() and waiter.admitted.exception() is None:
                self._leave(flow, line)  # let in and cancelled in the same moment
            raise
        entered = loop.time()
        turn = Turn(self, flow, line, cost, entered - came)
        try:
            yield turn
        finally:
            self._stay += (loop.time() - entered - self._stay) / 10
            self._leave(flow, line)

    def _line(self, adapter: Hashable | None, caller: Hashable) -> tuple[_Flow, _Line]:
        """Find or make the line; one that was idle starts at the present."""
        flow = self._flows.get(adapter) or self._flows.setdefault(adapter, _Flow(adapter, self._now))
        if not flow.inside and not flow.waiting:
            flow.served = max(flow.served, self._now)
        line = flow.lines.get(caller) or flow.lines.setdefault(caller, _Line(flow.now))
        if not line.inside and not line.waiting:
            line.served = max(line.served, flow.now)
        return flow, line

    def _step_out(self, line: _Line, waiter: _Waiter) -> None:
        line.waiting.remove(waiter)
        self.waiting -= 1
        self._move()

    def _shorten(self, own: _Line) -> None:
        """Turn away the newest of the longest line if too many wait; among equals the one that came last."""
        if self.waiting <= self.limit:
            return
        lines = (line for flow in self._flows.values() for line in flow.lines.values())
        longest = max(lines, key=lambda line: (len(line.waiting), line is own))
        turned_away = longest.waiting.pop()
        self.waiting -= 1
        if not turned_away.admitted.cancelled():
            retry_after = max(1, math.ceil(self.waiting * self._stay / self.places))
            turned_away.admitted.set_exception(QueueFull(retry_after))
        self._move()

    def _leave(self, flow: _Flow, line: _Line) -> None:
        self.inside -= 1
        flow.inside -= 1
        line.inside -= 1
        self._move()
        self._forget()

    def _forget(self) -> None:
        """Drop accounts that say no more than a new one would."""
        if not self.inside and not self.waiting:
            self._flows.clear()  # the end of a busy period settles all debts
            return
        for name, flow in list(self._flows.items()):
            for caller, line in list(flow.lines.items()):
                if not line.inside and not line.waiting and line.served <= flow.now:
                    del flow.lines[caller]
            if not flow.inside and not flow.waiting and flow.served <= self._now:
                del self._flows[name]

    def _move(self) -> None:
        """Let in whoever may go in now."""
        while True:
            self._hand_over_slots()
            flow = min(self._eligible(), key=lambda flow: flow.served, default=None)
            if flow is None:
                return
            self._admit(flow)

    def _admit(self, flow: _Flow) -> None:
        line = min((line for line in flow.lines.values() if line.waiting), key=lambda line: line.served)
        waiter = line.waiting.popleft()
        self.waiting -= 1
        if waiter.admitted.cancelled():
            return  # its task has not run since
        self._now, flow.now = max(self._now, flow.served), max(flow.now, line.served)
        flow.served += waiter.cost / flow.weight
        line.served += waiter.cost / line.weight
        self.inside += 1
        flow.inside += 1
        line.inside += 1
        if flow.began is None:
            flow.began = asyncio.get_running_loop().time()
        waiter.admitted.set_result(None)

    def _eligible(self) -> Iterator[_Flow]:
        if self.inside >= self.places:
            return
        base = self._flows.get(None)
        if base is not None and base.waiting:
            yield base
        ending = self._ending()
        for flow in self._holders:
            if flow.waiting and flow not in ending and not (flow.cold and flow.inside):
                yield flow

    def _ending(self) -> list[_Flow]:
        """The holders that let nobody in any more, since their turn is over and others wait for their slots."""
        if not self._without_slot:
            return []
        now = asyncio.get_running_loop().time()
        ends = {flow: flow.began + self.quantum * flow.weight for flow in self._holders if flow.began is not None}
        over = sorted((flow for flow, end in ends.items() if end <= now), key=lambda flow: ends[flow])
        free = self.slots - len(self._holders)
        return over[: max(0, len(self._without_slot) - free)]

    def _hand_over_slots(self) -> None:
        for flow in self._flows.values():
            if flow.adapter is not None and flow not in self._holders and flow.waiting:
                self._without_slot.setdefault(flow)
        for flow in [flow for flow in self._without_slot if not flow.waiting]:
            del self._without_slot[flow]
        for flow in self._ending():
            if not flow.inside:
                self._stand_up(flow)
                if flow.waiting:
                    self._without_slot[flow] = None
        for flow in [flow for flow in self._holders if not flow.inside and not flow.waiting]:
            self._stand_up(flow)
        while self._without_slot and len(self._holders) < self.slots:
            flow = next(iter(self._without_slot))
            del self._without_slot[flow]
            self._sit_down(flow)
            flow.cold, flow.began = True, None
            flow.served = max(flow.served, self._now)  # turns are shared by time; waiting for one earns no places

    def _sit_down(self, flow: _Flow) -> None:
        """Give a slot: the adapter's own where it still is in one, else that of the one which left longest ago.

        vLLM chooses its slots so, too; only the latter makes it copy weights.
        """
        if flow.adapter not in self._seated:
            self.swaps[flow.adapter] += 1
            if len(self._seated) == self.slots:
                holding = {holder.adapter for holder in self._holders}
                del self._seated[next(adapter for adapter in self._seated if adapter not in holding)]
        self._seated[flow.adapter] = None
        self._holders[flow] = None

    def _stand_up(self, flow: _Flow) -> None:
        """Take a slot back; the adapter's weights stay in it until another one needs it."""
        del self._holders[flow]
        del self._seated[flow.adapter]
        self._seated[flow.adapter] = None  # the last to go
