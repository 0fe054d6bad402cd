"""The gate: what a request passes on its way to the engine, in this order.

1. Has it a key, and does the key open this route (`serve.gate.access`)?
2. Is the server open, or draining?
3. Is there something left of the key's budget (`serve.gate.budget`)?
4. What does it ask for (`serve.gate.question`), and which version of which adapter is that?
5. Is it its turn (`serve.gate.queue`), and is the adapter in the engine (a lease)?
6. vLLM answers under the version's own name, and the answer passes as it is (`serve.gate.exchange`).

An adapter that a key may not use is answered as one that does not exist: names are not told to whom they don't concern.
The tokens of an answer are those that vLLM counts for middlewares, in the state of the request, so nothing is added to
requests or taken from answers.
"""

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from typing import Any

from qpack.errors import ServeError
from serve.gate.access import MODELS, PUBLIC, caller
from serve.gate.budget import Budgets
from serve.gate.catalogue import Catalogue, models
from serve.gate.exchange import ClientGone, Exchange, too_late
from serve.gate.figures import figures
from serve.gate.keys import Key, Keys
from serve.gate.limits import RequestLimits
from serve.gate.metrics import Metrics
from serve.gate.question import Question
from serve.gate.queue import FairQueue, QueueFull, Turn
from serve.gate.refusal import Refusal
from serve.gate.shadow import Heard, Shadows
from serve.gate.tracing import Tracing
from serve.gate.visit import Visit
from serve.registry import Version
from serve.routes import App, Message, Receive, Send

logger = logging.getLogger("qpack.serve.gate")

COMPLETIONS = frozenset({"/v1/completions", "/v1/chat/completions"})

_USE_SECONDS = 60.0
_ATTEMPTS = 3


class GateMiddleware:
    """For vLLM's ``--middleware``, the outermost one: the gate that the server's state has at ``qpack.gate``."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let HTTP through the gate, and the server's own messages past it; close WebSockets."""
        if scope["type"] == "http":
            await scope["app"].state.qpack.gate(self.app, scope, receive, send)
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})


class Gate:
    """Stands before an ASGI application that answers OpenAI's routes for the base and for each version by its id.

    Args:
        base: the name of the base.
        catalogue: which adapters there are.
        lease: has a version in the engine for the length of a block; raises ServeError if it can't be.
        keys: who may ask.
        queue: who goes next; its slots are the engine's.
        limits: how much is let in.
        metrics: where it is counted.
        engine_died: whether the engine will never answer again.
        max_model_len: tokens of a prompt and its answer, for the list of models.
        chat: whether the models have a chat template, for that list.
        tracing: traces completions.
    """

    def __init__(
        self,
        *,
        base: str,
        catalogue: Catalogue,
        lease: Callable[[Version], AbstractAsyncContextManager[object]],
        keys: Keys,
        queue: FairQueue,
        limits: RequestLimits,
        metrics: Metrics,
        engine_died: Callable[[], bool],
        max_model_len: int | None = None,
        chat: bool = True,
        tracing: Tracing | None = None,
    ) -> None:
        self._base, self._catalogue, self._lease, self._keys, self._queue = base, catalogue, lease, keys, queue
        self._limits, self._metrics, self._engine_died, self._tracing = limits, metrics, engine_died, tracing
        self._said = {"max_model_len": max_model_len, "chat": chat}
        self._started = time.time()
        self._budgets = Budgets()
        self._shadows = Shadows(queue, lease, metrics, self._broken)
        self._noted: dict[str, float] = {}  # when the use of a key was written down
        self._writing: set[asyncio.Task[None]] = set()
        self._closed: str | None = None
        self._inside = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._hopeless: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._generation = -1
        self._listed: set[str] = set()

    def close(self, reason: str) -> None:
        """Let nobody in any more; ``/health`` says so too, for load balancers to look elsewhere."""
        self._closed = reason
        self._shadows.close()

    def figures(self) -> dict[str, Any]:
        """How many requests there are now, and what became of those before (`serve.gate.figures`)."""
        return figures(self._base, self._metrics, self._queue)

    def give_up(self) -> None:
        """Answer those who wait for their turn or their adapter: the engine is dead."""
        if not self._hopeless.done():
            self._hopeless.set_result(None)

    async def idle(self) -> None:
        """Wait until those that were let in have their answers."""
        await self._quiet.wait()

    async def __call__(self, app: App, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one HTTP request, or let ``app`` do so."""
        exchange = Exchange(scope, receive, send)
        if (scope["method"], scope["path"]) in PUBLIC:
            if self._closed is not None:
                return await exchange.refuse(Refusal(503, self._closed, retry_after=5))
            return await app(scope, receive, exchange.send)
        visit = Visit(exchange, _now())
        with self._tracing.span(visit) if self._tracing and scope["path"] in COMPLETIONS else nullcontext():
            try:
                await self._pass(app, visit)
            except Refusal as refusal:
                visit.reason = str(refusal)
                await exchange.refuse(refusal)
            except ClientGone:
                visit.left = True
            except BaseException as error:
                visit.reason = f"{type(error).__name__}: {error}"
                exchange.status = exchange.status or 500
                raise
            finally:
                visit.end(self._metrics)

    async def _pass(self, app: App, visit: Visit) -> None:
        exchange = visit.exchange
        method, path = exchange.scope["method"], exchange.scope["path"]
        key = visit.key = caller(exchange, self._keys)
        if key:
            self._note_use(key)
        if method == "GET" and (path == MODELS or path.startswith(f"{MODELS}/")):
            return await self._list(exchange, key)
        if self._closed is not None and method != "GET":
            raise Refusal(503, self._closed, retry_after=5)
        self._inside += 1
        self._quiet.clear()
        try:
            if method == "POST" and path in COMPLETIONS:
                visit.completion = True
                if broken := self._broken():
                    raise broken
                await self._complete(app, visit)
            else:
                await app(exchange.scope, exchange.receive, exchange.send)
        finally:
            self._inside -= 1
            if not self._inside:
                self._quiet.set()

    async def _list(self, exchange: Exchange, key: Key | None) -> None:
        """Answer ``/v1/models`` and ``/v1/models/{model}``."""
        cards = models(self._base, self._catalogue, key, self._started, self._said)
        found: dict[str, Any] | None = {"object": "list", "data": cards}
        if name := exchange.scope["path"].removeprefix(MODELS).removeprefix("/"):
            found = next((card for card in cards if card["id"] == name), None)
        if found is None:
            raise _no_such_model(name)
        await exchange.answer(json.dumps(found).encode())

    async def _complete(self, app: App, visit: Visit) -> None:
        """Check a request for completions against the limits, and have it answered."""
        exchange, key = visit.exchange, visit.key
        end = visit.came + self._patience(exchange)
        budget = self._budgets.of(key, visit.came) if key else None
        with budget.request(visit.came) if budget else nullcontext():
            raw = await exchange.read(self._limits.max_body_bytes)
            question = Question.parse(raw, self._limits, exchange.headers.get("x-session-id"))
            visit.model = question.model or self._base
            self._forget_what_is_gone()
            version = self._find(question, key)  # what isn't there costs no tokens
            if budget:
                budget.take(question.tokens, _now())
            try:
                async with exchange.watched():
                    await self._answer(app, visit, question, version, end)
            finally:
                if budget:
                    budget.correct(visit.tokens - question.tokens, _now())

    async def _answer(self, app: App, visit: Visit, question: Question, version: Version | None, end: float) -> None:
        """Wait for a place in the engine and for the adapter to be there, and let the application answer.

        Where the adapter's version has left the registry before its turn, the alias's next one answers.
        """
        for _ in range(_ATTEMPTS):
            visit.adapter, _, visit.version = (version.id if version else self._base).partition("@")
            async with AsyncExitStack() as stack:
                try:
                    turn = await self._enter(stack, visit, question, version, end)
                except ServeError as error:
                    logger.warning("%s", error)
                    failed, version = version, self._find(question, visit.key)
                    if version != failed:
                        continue  # the alias was flipped meanwhile
                    raise Refusal(503, f"{visit.model} can't be loaded now, ask again", retry_after=5) from error
                return await self._forward(app, visit, question, turn, end)
        raise Refusal(503, f"{visit.model} changes too often to be loaded, ask again", retry_after=5)

    async def _enter(
        self, stack: AsyncExitStack, visit: Visit, question: Question, version: Version | None, end: float
    ) -> Turn:
        key, came = visit.key, _now()
        last = min(came + self._limits.queue_timeout, end)
        try:
            async with visit.exchange.patience(last - came, self._hopeless):
                waiting = self._queue.turn(
                    version.id if version else None,
                    key.id if key else None,
                    cost=question.tokens,
                    weight=self._limits.weights.get(visit.adapter, 1.0),
                    caller_weight=key.weight if key else 1.0,
                )
                turn = await stack.enter_async_context(waiting)
                visit.queue_seconds = turn.waited
                if version:
                    entered = _now()
                    await stack.enter_async_context(self._lease(version))
                    visit.load_seconds = _now() - entered
                    turn.warm()
                if broken := self._broken():
                    raise broken  # it died meanwhile
                visit.entered = _now()
                return turn
        except QueueFull as full:
            raise Refusal(429, "too many requests are waiting", retry_after=full.retry_after) from None
        except TimeoutError:
            if broken := self._broken():
                raise broken from None
            if last < end:
                raise Refusal(503, f"no turn came within {last - came:g} s", retry_after=1) from None
            raise too_late() from None

    async def _forward(self, app: App, visit: Visit, question: Question, turn: Turn, end: float) -> None:
        exchange = visit.exchange
        asked = f"{visit.adapter}@{visit.version}" if visit.version else self._base
        exchange.extra_headers.append((b"x-qpack-version", asked.encode()))
        alias = self._catalogue.aliases().get(question.model or "")
        shadow = alias.shadow if alias else None
        heard = Heard() if shadow else None
        state: dict[str, Any] = {}
        try:
            state = await exchange.forward(
                app,
                question.for_model(asked),
                seconds=end - _now(),
                broken=self._broken,
                heard=heard.add if heard else None,
            )
        finally:
            visit.count(question, state)
            turn.settle(max(1, visit.tokens))
        if shadow and heard and exchange.status == 200 and not exchange.error:
            self._shadows.ask(app, exchange, question, shadow, heard)

    def _find(self, question: Question, key: Key | None) -> Version | None:
        """The version that answers, None for the base.

        Raises:
            Refusal: 404 if there is none, or none that the key may use; 503 if this server has no room for its rank.
        """
        model = question.model
        if model is None or model == self._base:
            version, name = None, self._base
        elif version := self._catalogue.resolve(model, question.sticky):
            name = version.name
        else:
            raise _no_such_model(model)
        if key and not key.may_use(name):
            raise _no_such_model(model or name)
        if version and version.unservable:
            raise Refusal(503, f"{version.id} is not served: {version.unservable}", "model")
        return version

    def _patience(self, exchange: Exchange) -> float:
        """Seconds until the end of the answer."""
        asked = exchange.headers.get("x-request-timeout")
        if asked is None:
            return self._limits.request_timeout
        try:
            seconds = float(asked)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise Refusal(400, f"x-request-timeout {asked!r} is not a number of seconds")
        return min(seconds, self._limits.request_timeout)

    def _broken(self) -> Refusal | None:
        """Why no answer can be right, if so."""
        if self._engine_died():
            return Refusal(503, "the engine died and is being restarted, ask again", retry_after=10)
        return None

    def _note_use(self, key: Key) -> None:
        """Have the use of a key written down, once a minute, by a thread: the file may be locked for a moment."""
        now = _now()
        if now - self._noted.get(key.id, -math.inf) < _USE_SECONDS:
            return
        self._noted[key.id] = now

        async def write() -> None:
            try:
                await asyncio.to_thread(self._keys.note_use, key.id)
            except ServeError as error:
                logger.warning("%s", error)

        task = asyncio.create_task(write())
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    def _forget_what_is_gone(self) -> None:
        """Drop the metrics of versions that have left the registry, so that there are never more than it lists."""
        if (generation := self._catalogue.generation()) == self._generation:
            return
        self._generation = generation
        listed = {version.id for version in self._catalogue.versions()}
        for gone in self._listed - listed:
            adapter, _, digits = gone.partition("@")
            self._metrics.forget(adapter, digits)
        self._listed = listed


def _no_such_model(name: str) -> Refusal:
    return Refusal(404, f"the model {name!r} does not exist", "model")


def _now() -> float:
    return asyncio.get_running_loop().time()
