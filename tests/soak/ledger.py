"""Which versions may answer whom, at any moment, while they change.

A request may be answered by what its model pointed at when it was sent, or by anything that it has pointed at since. A
change is a moment somewhere between its request and its answer: until the answer is there, both sides of it may be.
"""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

Answerer: TypeAlias = str | None
"""The id of a version, or the base's name; None where the answer is that there is no such model."""


@dataclass(slots=True, eq=False)
class Watch:
    """One request's view of a model."""

    seen: set[Answerer]
    """All that it may have been answered by."""


@dataclass(slots=True, eq=False)
class Model:
    """A name or an id that clients send."""

    now: set[Answerer] = field(default_factory=lambda: {None})
    changing: int = 0
    watches: list[Watch] = field(default_factory=list)
    settled: asyncio.Event = field(default_factory=asyncio.Event)


class Ledger:
    """What the models of a server point at, as far as those know who change it."""

    def __init__(self, base: str, answers: Mapping[str, str]) -> None:
        """Begin with a base alone, and what it answers."""
        self._models = {base: Model({base})}
        self._answers = {base: answers}

    @property
    def base(self) -> str:
        """What clients call the base."""
        return next(iter(self._models))

    @property
    def names(self) -> list[str]:
        """All names that adapters have, or have had."""
        return [name for name in self._models if "@" not in name and name != self.base]

    @property
    def versions(self) -> list[str]:
        """The ids that can be asked for now."""
        return [name for name, model in self._models.items() if "@" in name and model.now != {None}]

    def learn(self, version: str, answers: Mapping[str, str]) -> None:
        """Note what a version answers."""
        self._answers[version] = answers

    def becomes(self, name: str, *now: Answerer) -> None:
        """Note what a model points at from now on."""
        model = self._model(name)
        model.now = set(now)
        for watch in model.watches:
            watch.seen |= model.now

    @contextmanager
    def changing(self, *names: str) -> Iterator[None]:
        """For the time of the block nobody knows what these models point at."""
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(_changing(self._model(name)))
            yield

    @contextmanager
    def watch(self, name: str) -> Iterator[Watch]:
        """Note for a request what its model points at, from before it is sent until its answer is checked."""
        model = self._model(name)
        watch = Watch(set(model.now))
        model.watches.append(watch)
        try:
            yield watch
        finally:
            model.watches.remove(watch)

    async def may(self, name: str, watch: Watch, answerer: Answerer) -> bool:
        """Whether it was right to be answered so; waits for a change that is under way, if need be."""
        model = self._model(name)
        if answerer not in watch.seen and model.changing:
            await model.settled.wait()
        return answerer in watch.seen

    def answer(self, answerer: str, prompt: str) -> str:
        """What a version answers."""
        return self._answers[answerer][prompt]

    def _model(self, name: str) -> Model:
        return self._models.setdefault(name, Model())


@contextmanager
def _changing(model: Model) -> Iterator[None]:
    model.changing += 1
    model.settled.clear()
    try:
        yield
    finally:
        model.changing -= 1
        if not model.changing:
            model.settled.set()
