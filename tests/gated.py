"""A real gate on a real port, before a stand-in for vLLM: its routes, its shapes, its ways to fail, and no engine.

What the stand-in says is ``MODEL says PROMPT``, a word a token. The prompt may hold orders, each a word: ``held`` to
wait until the test lets go, ``slow`` to wait ten times as long, ``crash`` and ``die`` to fail before the answer,
``crash-later`` and ``die-later`` in it (who dies is dead from then on), ``nameless`` to say ``somebody`` for the model,
``linger`` to do something after the answer.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from qpack.errors import ServeError
from serve import admin, page
from serve.gate.gate import Gate, GateMiddleware
from serve.gate.keys import Keys
from serve.gate.limits import RequestLimits
from serve.gate.metrics import Metrics
from serve.gate.queue import FairQueue
from serve.gate.tracing import Tracing
from serve.registry import Alias, Registry, Version

BASE = "tiny"
TOKEN_SECONDS = 0.01


def version(name: str, digest: str) -> Version:
    """One of the registry's, but for the files."""
    return Version(name, digest, Path("/nowhere"), 8, 1, "base", 1.7e9, "test", pinned=False)


def alias(live: Version, canaries: Mapping[Version, float] | None = None, shadow: Version | None = None) -> Alias:
    """One of the registry's."""
    return Alias(live.name, live, 1.7e9, "test", canaries or {}, shadow)


class Shelf:
    """A registry in memory."""

    def __init__(self, aliases: Mapping[str, Alias]) -> None:
        self._aliases = dict(aliases)
        self._generation = 0

    def put(self, alias: Alias) -> None:
        """Point a name at something else."""
        self._aliases[alias.name] = alias
        self._generation += 1

    def resolve(self, model: str, sticky: str | None = None) -> Version | None:
        """As the registry."""
        if found := self._aliases.get(model):
            return found.choose(sticky)
        return next((one for one in self.versions() if one.id == model), None)

    def aliases(self) -> Mapping[str, Alias]:
        """As the registry."""
        return self._aliases

    def versions(self) -> Sequence[Version]:
        """As the registry."""
        found = [(one.live, *one.canaries, *filter(None, [one.shadow])) for one in self._aliases.values()]
        return [one for versions in found for one in versions]

    def generation(self) -> int:
        """As the registry."""
        return self._generation


class Engine:
    """What is behind the gate."""

    def __init__(self) -> None:
        self.dead = False
        self.let_go = threading.Event()
        """Ends the waiting of who is ``held``."""
        self.asked: list[dict[str, Any]] = []
        self.request_ids: list[str | None] = []
        self.traces: list[dict[str, str]] = []
        self.running = self.aborted = 0
        self.most_adapters = 0
        self._models: list[str] = []

    async def answer(self, request: Request) -> Response:
        """Do as ``/v1/completions`` and ``/v1/chat/completions`` do."""
        body = await request.json()
        self.asked.append(body)
        self.request_ids.append(request.headers.get("x-request-id"))
        trace = {name: request.headers[name] for name in ("traceparent", "tracestate") if name in request.headers}
        self.traces.append(trace)
        chat = "messages" in body
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        orders = prompt.split()
        request.state.request_metadata = metadata = SimpleNamespace(final_usage_info=None)
        if "bad" in orders:
            return _error(400, "BadRequestError", "no such thing")
        name = "somebody" if "nameless" in orders else body["model"]
        words = [f"{word} " for word in (name, "says", *orders)]
        after = BackgroundTask(asyncio.sleep, 5 * TOKEN_SECONDS) if "linger" in orders else None
        if body.get("stream"):
            return StreamingResponse(
                self._stream(words, orders, metadata, body, chat=chat),
                media_type="text/event-stream",
                background=after,
            )
        # As vLLM's `with_cancellation`: it listens, and is not cancelled with its own task.
        work = asyncio.create_task(self._whole(words, orders, metadata, body, chat=chat))
        listening = asyncio.create_task(_disconnect(request))
        done, pending = await asyncio.wait([work, listening], return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        answer = work.result() if work in done else JSONResponse(None)
        answer.background = after
        answer.headers["x-request-id"] = "the application's"
        return answer

    async def _words(self, words: list[str], orders: list[str], model: str) -> AsyncIterator[str]:
        self.running += 1
        self._models.append(model)
        self.most_adapters = max(self.most_adapters, len({name for name in self._models if name != BASE}))
        try:
            while "held" in orders and not self.let_go.is_set():
                await asyncio.sleep(TOKEN_SECONDS)
            for index, word in enumerate(words):
                await asyncio.sleep(TOKEN_SECONDS * (10 if "slow" in orders else 1))
                for order in ("crash", "die"):
                    if order in orders or (f"{order}-later" in orders and index == 2):
                        self.dead = self.dead or order == "die"
                        raise RuntimeError(order)
                yield word
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise
        finally:
            self.running -= 1
            self._models.remove(model)

    async def _whole(
        self, words: list[str], orders: list[str], metadata: Any, body: dict[str, Any], *, chat: bool
    ) -> Response:
        try:
            said = [word async for word in self._words(words, orders, body["model"])]
        except RuntimeError as error:
            if str(error) == "crash":
                raise
            return _error(500, "InternalServerError", "EngineCore encountered an issue.")
        metadata.final_usage_info = usage = _usage(orders, said)
        text = "".join(said)
        choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return JSONResponse(_completion(body["model"], chat, {**choice, "finish_reason": "stop"}, usage=vars(usage)))

    async def _stream(
        self, words: list[str], orders: list[str], metadata: Any, body: dict[str, Any], *, chat: bool
    ) -> AsyncIterator[str]:
        said = []
        try:
            async for word in self._words(words, orders, body["model"]):
                said.append(word)
                choice = {"delta": {"content": word}} if chat else {"text": word}
                yield f"data: {json.dumps(_completion(body['model'], chat, choice))}\n\n"
        except RuntimeError as error:
            if str(error) == "crash":
                raise
            error_body = {"error": {"message": "EngineCore encountered", "type": "InternalServerError", "code": 500}}
            yield f"data: {json.dumps(error_body)}\n\n"
        else:
            metadata.final_usage_info = usage = _usage(orders, said)
            if (body.get("stream_options") or {}).get("include_usage"):
                yield f"data: {json.dumps(_completion(body['model'], chat, None, usage=vars(usage)))}\n\n"
        yield "data: [DONE]\n\n"


def _usage(orders: list[str], said: list[str]) -> SimpleNamespace:
    return SimpleNamespace(prompt_tokens=len(orders), completion_tokens=len(said), total_tokens=len(orders) + len(said))


def _completion(model: str, chat: bool, choice: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    kind = "chat.completion" if chat else "text_completion"
    choices = [] if choice is None else [{"index": 0, "finish_reason": None, **choice}]
    return {"id": "x", "object": kind, "created": 1, "model": model, "choices": choices, **more}


def _error(status: int, kind: str, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Residency:
    """Loads at once, but for versions that it is told to load slowly or not at all."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.broken: set[str] = set()
        self.loaded: set[str] = set()
        self.leased: list[str] = []

    @property
    def resident(self) -> list[str]:
        return sorted(self.loaded)

    @asynccontextmanager
    async def lease(self, version: Version) -> AsyncIterator[None]:
        if version.id not in self.loaded:
            await asyncio.sleep(self.seconds.get(version.id, 0.0))
            if version.id in self.broken:
                raise ServeError(f"/secret/path/{version.id} is not there")
            self.loaded.add(version.id)
        self.leased.append(version.id)
        try:
            yield
        finally:
            self.leased.remove(version.id)


@dataclass
class Site:
    """A gate that is running."""

    url: str
    gate: Gate
    queue: FairQueue
    shelf: Shelf
    engine: Engine
    residency: Residency
    metrics: CollectorRegistry
    loop: asyncio.AbstractEventLoop

    def client(self, token: str | None = None, **headers: str) -> httpx.Client:
        """A client; use it in a ``with``."""
        if token:
            headers["authorization"] = f"Bearer {token}"
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, trust_env=False, verify=False)

    def ask(
        self, prompt: str = "hello", model: str | None = None, token: str | None = None, **body: Any
    ) -> httpx.Response:
        """Ask for a completion."""
        named = {} if model is None else {"model": model}
        with self.client(token, **body.pop("headers", {})) as client:
            return client.post("/v1/completions", json={"prompt": prompt, **named, **body})

    def figure(self, name: str, **labels: str) -> float | None:
        """A metric, None where there is no such series."""
        return self.metrics.get_sample_value(name, labels)

    def call(self, function: Any, *arguments: Any) -> None:
        """Call something in the server's event loop."""
        self.loop.call_soon_threadsafe(function, *arguments)


@contextmanager
def site(
    directory: Path,
    *,
    names: Sequence[str] = ("support", "billing"),
    places: int = 8,
    slots: int = 2,
    quantum: float = 0.2,
    limits: RequestLimits | None = None,
    client_host: str | None = None,
    registry: Registry | None = None,
    chat: bool = True,
    tracing: Tracing | None = None,
) -> Iterator[Site]:
    """Run a gate on a free port, in a thread, over adapters of these names, or over a real registry with its routes.

    ``client_host`` is where all clients seem to come from.
    """
    chosen = limits or RequestLimits()
    shelf = Shelf({name: alias(version(name, f"{number}" * 12)) for number, name in enumerate(names)})
    engine, residency, metrics = Engine(), Residency(), CollectorRegistry()

    async def say(request: Request) -> Response:
        return JSONResponse({"path": request.url.path})

    async def show(request: Request) -> Response:
        return Response(generate_latest(metrics), media_type="text/plain")

    managing = () if registry else ("/v1/adapters",)
    get = [Route(path, say) for path in ("/health", "/version", *managing)]
    post = [Route(path, say, methods=["POST"]) for path in ("/adapters", "/invocations", *managing)]
    completions = [
        Route(f"/v1/{kind}", engine.answer, methods=["POST"]) for kind in ("completions", "chat/completions")
    ]
    routes: list[BaseRoute] = [*get, *post, *completions, Route("/metrics", show)]
    app = FastAPI(routes=routes, middleware=[Middleware(GateMiddleware)], openapi_url=None)
    app.include_router(page.router)
    if registry:
        app.include_router(admin.router)

    async def outside(scope: Any, receive: Any, send: Any) -> None:
        if client_host and scope["type"] == "http":
            scope["client"] = (client_host, 1)
        await app(scope, receive, send)

    config = uvicorn.Config(outside, port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    started = threading.Event()
    made: list[Site] = []

    async def main() -> None:
        queue = FairQueue(places, slots, quantum=quantum, limit=chosen.max_waiting)
        with closing(Keys(directory)) as keys:
            gate = Gate(
                base=BASE,
                catalogue=registry or shelf,
                lease=residency.lease,
                keys=keys,
                queue=queue,
                limits=chosen,
                metrics=Metrics(queue, BASE, metrics),
                engine_died=lambda: engine.dead,
                max_model_len=128,
                chat=chat,
                tracing=tracing,
            )
            app.state.qpack = SimpleNamespace(gate=gate, registry=registry, residency=residency, takes_adapters=True)
            task = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            made.append(Site(url, gate, queue, shelf, engine, residency, metrics, asyncio.get_running_loop()))
            started.set()
            await task

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert started.wait(10)
    try:
        yield made[0]
    finally:
        server.should_exit = True
        thread.join(10)


def until(true: Callable[[], bool]) -> None:
    """Wait for something that will come."""
    last = time.monotonic() + 10
    while not true():
        assert time.monotonic() < last
        time.sleep(0.005)
