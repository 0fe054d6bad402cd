"""Copies of requests to a version that nobody is answered by, to see how it would have answered.

A copy is sent when the first answer has been given, and only if the engine has a place that nobody waits for: what is
compared is a sample, and no request is slower for it. Answers are equal if all their texts are; with a temperature two
answers of one version differ too, so ask for temperature 0 or a seed.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from enum import StrEnum

from qpack.errors import ServeError
from serve.gate.exchange import ClientGone, Exchange
from serve.gate.metrics import Metrics
from serve.gate.question import Question
from serve.gate.queue import FairQueue, NoneSpare
from serve.gate.refusal import Refusal
from serve.registry import Version
from serve.routes import App, Message

logger = logging.getLogger("qpack.serve.gate")

_SECONDS = 120.0


class Outcome(StrEnum):
    """What has come of a copy."""

    SAME = "same"
    DIFFERENT = "different"
    SKIPPED = "skipped"
    FAILED = "failed"


class Heard:
    """What a client was answered."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        """Add what was sent."""
        self._pieces.append(piece)

    def texts(self, *, streamed: bool) -> dict[int, str]:
        """The text of each choice, by its index.

        Raises:
            ValueError: if it isn't an answer.
        """
        raw = b"".join(self._pieces).decode()
        if not streamed:
            return _texts([raw])
        lines = (line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: "))
        return _texts([line for line in lines if line != "[DONE]"])


def _texts(parts: list[str]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for part in parts:
        for choice in json.loads(part)["choices"]:
            said = choice.get("delta") or choice.get("message") or choice
            calls = [call["function"] for call in said.get("tool_calls") or ()]
            called = "".join((call.get("name") or "") + (call.get("arguments") or "") for call in calls)
            text = (said.get("content") or said.get("text") or "") + called
            texts[choice["index"]] = texts.get(choice["index"], "") + text
    return texts


class Shadows:
    """Asks them."""

    def __init__(
        self,
        queue: FairQueue,
        lease: Callable[[Version], AbstractAsyncContextManager[object]],
        metrics: Metrics,
        broken: Callable[[], Refusal | None],
    ) -> None:
        self._queue, self._lease, self._metrics, self._broken = queue, lease, metrics, broken
        self._asking: set[asyncio.Task[None]] = set()
        self._closed = False

    def close(self) -> None:
        """Ask no more of them, and wait for none."""
        self._closed = True
        for task in self._asking:
            task.cancel()

    def ask(self, app: App, first: Exchange, question: Question, version: Version, heard: Heard) -> None:
        """Ask ``version`` what another has answered, some time, and count what comes of it."""
        if not self._closed:
            task = asyncio.create_task(self._compare(app, first, question, version, heard))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _compare(self, app: App, first: Exchange, question: Question, version: Version, heard: Heard) -> None:
        try:
            async with self._queue.turn(version.id, cost=question.tokens, spare=True) as turn, self._lease(version):
                turn.warm()
                theirs = await self._answer(app, first, question.unstreamed(version.id))
            same = heard.texts(streamed=first.streaming) == theirs.texts(streamed=False)
            outcome = Outcome.SAME if same else Outcome.DIFFERENT
        except NoneSpare:
            outcome = Outcome.SKIPPED
        except (Refusal, ServeError, ClientGone, ValueError, KeyError) as error:
            logger.warning("shadow %s: %s: %s", version.id, type(error).__name__, error)
            outcome = Outcome.FAILED
        adapter, _, digits = version.id.partition("@")
        self._metrics.shadows.labels(adapter, digits, outcome.value).inc()

    async def _answer(self, app: App, first: Exchange, body: bytes) -> Heard:
        """Ask as the client of ``first`` did, but for the body, and listen."""
        heard = Heard()

        async def receive() -> Message:
            raise AssertionError("the body is given, and nobody leaves")

        async def send(_: Message) -> None:
            pass

        exchange = Exchange(first.scope, receive, send)
        exchange.request_id = f"{first.request_id}-shadow"
        await exchange.forward(app, body, seconds=_SECONDS, broken=self._broken, heard=heard.add)
        if exchange.status != 200:
            raise ValueError(f"status {exchange.status}")
        return heard
