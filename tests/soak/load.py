"""Requests of all kinds, as many a second as asked for, and whether each was answered as it should be.

Open loop: a request is sent when its time has come, not when another has its answer; but only so many are there at a
time, for a queue that grows for ever would measure nothing.
"""

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import httpx
from taught import PROMPTS

from soak.ledger import Ledger

MAX_TOKENS = 24

_WHOLE: Final = "whole answers"
_STREAMED: Final = "streamed answers"
_LEFT: Final = "left by the client"
_DEADLINE: Final = "deadline passed"
_NOBODY: Final = "no such model"

# Requests of each kind in a hundred; some of all kinds are for a model that isn't there.
_KINDS = {_WHOLE: 45, _STREAMED: 38, _LEFT: 10, _DEADLINE: 7}

_SOON_SECONDS = 0.3
"""Within which a client leaves, or a deadline passes, at random."""
_PATIENCE_SECONDS = 120.0


class FaultError(Exception):
    """An answer that should not have been given."""


@dataclass(slots=True)
class Answer:
    """What came of an answer, so far."""

    streamed: bool
    status: int = 0
    """0 until it begins."""
    version: str | None = None
    text: str = ""
    finish: str | None = None
    """Why it ended; None before it has."""
    error: int | None = None
    """The code of an error in a stream."""

    def take(self, body: dict[str, Any]) -> None:
        """Add a chunk of a stream, or all of an answer."""
        if "error" in body:
            self.error = body["error"]["code"]
            return
        if body["model"] != self.version:
            raise FaultError(f"the header says {self.version}, the body {body['model']}")
        for choice in body["choices"]:
            said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            self.text += said.get("content") or ""
            self.finish = choice["finish_reason"] or self.finish


class Load:
    """Asks one server.

    Args:
        url: of the server, with ``/v1``.
        ledger: who may answer, and what.
        rate: requests a second, on average.
        at_once: requests that wait for their answers at most.
        seed: of all that is drawn.
    """

    def __init__(self, url: str, ledger: Ledger, *, rate: float, at_once: int, seed: int) -> None:
        self._ledger, self._rate = ledger, rate
        self._draw = random.Random(seed)
        self._places = asyncio.Semaphore(at_once)
        # A connection for each: one that is kept may be closed by the server in the moment in which it is used again.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.AsyncClient(base_url=url, limits=limits, trust_env=False)
        self.outcomes: Counter[str] = Counter()
        """How many requests ended how, all as they should."""
        self.faults: list[str] = []
        self.seconds: list[float] = []
        """How long each whole answer took."""

    @property
    def answers(self) -> int:
        """Those that were compared from beginning to end."""
        return self.outcomes[_WHOLE] + self.outcomes[_STREAMED]

    async def run(self, over: asyncio.Event) -> None:
        """Ask until it is over, and wait for all answers."""
        due = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while not over.is_set():
                await self._places.acquire()
                group.create_task(self._one())
                due = max(due, time.monotonic() - 1) + self._draw.expovariate(self._rate)  # a second is made up for
                await asyncio.sleep(due - time.monotonic())

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _one(self) -> None:
        model = self._model()
        prompt = self._draw.choice(PROMPTS)
        [kind] = self._draw.choices([*_KINDS], [*_KINDS.values()])
        answer = Answer(streamed=kind == _STREAMED or (kind != _WHOLE and self._draw.random() < 0.5))
        began = time.monotonic()
        try:
            with self._ledger.watch(model) as watch:
                try:
                    await self._ask(answer, kind, model, prompt)
                except httpx.ReadTimeout:
                    if kind != _LEFT:
                        raise
                answerer = answer.version if answer.status == 200 else None
                if answer.status in (200, 404) and not await self._ledger.may(model, watch, answerer):
                    raise FaultError(f"answered by {answerer}, expected one of {watch.seen}")
            outcome = self._outcome(kind, prompt, answer)
        except (FaultError, httpx.HTTPError, ValueError, LookupError) as error:
            self.faults.append(f"{kind}, {model}, {prompt!r}: {type(error).__name__}: {error}")
        else:
            self.outcomes[outcome] += 1
            if outcome in (_WHOLE, _STREAMED):
                self.seconds.append(time.monotonic() - began)
        finally:
            self._places.release()

    def _model(self) -> str:
        """Mostly names, as people do."""
        ledger = self._ledger
        models = {ledger.base: 20, "nobody": 2} | dict.fromkeys(ledger.names, 60 / max(1, len(ledger.names)))
        models |= dict.fromkeys(ledger.versions, 18 / max(1, len(ledger.versions)))
        [model] = self._draw.choices([*models], [*models.values()])
        return model

    async def _ask(self, answer: Answer, kind: str, model: str, prompt: str) -> None:
        """Send a request, and fill in ``answer`` as it comes."""
        body: dict[str, Any] = {"model": model, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": answer.streamed}
        if self._draw.random() < 0.5:
            path, body["messages"] = "/chat/completions", [{"role": "user", "content": prompt}]
        else:
            path, body["prompt"] = "/completions", f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        headers = {"x-session-id": f"s{self._draw.randrange(20)}"}
        if kind == _DEADLINE:
            headers["x-request-timeout"] = f"{self._draw.uniform(0.01, _SOON_SECONDS):.3f}"
        patience = self._draw.uniform(0.001, _SOON_SECONDS) if kind == _LEFT else _PATIENCE_SECONDS
        timeout = httpx.Timeout(_PATIENCE_SECONDS, read=patience)
        async with self._client.stream("POST", path, json=body, headers=headers, timeout=timeout) as response:
            answer.version = response.headers.get("x-qpack-version")
            answer.status = response.status_code
            if answer.status != 200:
                text = (await response.aread()).decode(errors="replace")
                if answer.status != 404 and (answer.status, kind) != (504, _DEADLINE):
                    raise FaultError(f"status {answer.status}: {text}")
            elif answer.streamed:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        answer.take(json.loads(line.removeprefix("data: ")))
                    if kind == _LEFT and self._draw.random() < 0.2:
                        break
            else:
                answer.take(json.loads(await response.aread()))

    def _outcome(self, kind: str, prompt: str, answer: Answer) -> str:
        """What a request has come to, if nothing is wrong with it but, perhaps, what was answered."""
        match answer.status:
            case 0:
                return _LEFT
            case 404:
                return _NOBODY
            case 504:
                return _DEADLINE
        expected = self._ledger.answer(answer.version or "", prompt)
        if answer.finish is None:
            if kind != _LEFT and (kind, answer.error) != (_DEADLINE, 504):
                raise FaultError(f"{answer.version} broke off after {answer.text!r}: {answer.error}")
            if not expected.startswith(answer.text):
                raise FaultError(f"{answer.version} began {answer.text!r}, expected {expected!r}")
            return kind
        if (answer.text, answer.finish) != (expected, "stop"):
            raise FaultError(f"{answer.version} answered {answer.text!r} ({answer.finish}), expected {expected!r}")
        return _STREAMED if answer.streamed else _WHOLE
