"""The entry point ``vllm.endpoint_plugins``: what vLLM's server is told once it is built, in the API process.

vLLM calls `Endpoint.init_state` between making the engine and accepting. It finds in ``args.qpack`` what `serve.engine`
has put there, puts the gate and what it stands before into the server's state, and starts what runs beside the
requests.
"""

import asyncio
import os
import signal
from argparse import Namespace
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from opentelemetry import trace
from prometheus_client import REGISTRY

from serve import admin, lora_gauge, page
from serve.config import ServeConfig
from serve.control import Parent
from serve.engine_adapters import EngineAdapters
from serve.gate.gate import Gate
from serve.gate.keys import Keys
from serve.gate.metrics import Metrics
from serve.gate.queue import FairQueue
from serve.gate.tracing import Tracing
from serve.registry import Registry
from serve.registry.metrics import RefusalCollector
from serve.residency import Residency
from serve.staging import Stage

# vLLM itself looks every five seconds; requests that come meanwhile would wait for nothing.
_WATCH_SECONDS = 0.25

_FOLLOW_SECONDS = 0.25
_LAST_ANSWERS_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Serving:
    """What the plugin needs of the process that it runs in."""

    config: ServeConfig
    parent: Parent
    registry: Registry
    keys: Keys
    stage: Stage


class Endpoint:
    """vLLM's ``EndpointPlugin``."""

    name = "qpack"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add the routes that adapters are managed by, and the page."""
        app.include_router(admin.router)
        app.include_router(page.router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Build what stands before the engine, and start what runs beside the requests."""
        lora_gauge.hold(engine_client)
        state.qpack = Running(engine_client, state, args.qpack)


class Running:
    """One server: at ``app.state.qpack`` for the middleware and the routes."""

    def __init__(self, engine_client: Any, state: Any, serving: Serving) -> None:
        config, self.registry = serving.config, serving.registry
        self._engine, self._state, self._parent = engine_client, state, serving.parent
        self._drain_timeout = config.drain_timeout
        self.residency = Residency(
            EngineAdapters(engine_client, state.openai_serving_models),
            serving.stage,
            serving.registry.hold,
            config.max_cpu_loras or 0,
        )
        queue = FairQueue(
            places=engine_client.vllm_config.scheduler_config.max_num_seqs,
            slots=config.max_loras or 0,
            quantum=config.limits.turn_seconds,
            limit=config.limits.max_waiting,
        )
        self.gate = Gate(
            base=config.name,
            catalogue=serving.registry,
            lease=self.residency.lease,
            keys=serving.keys,
            queue=queue,
            limits=config.limits,
            metrics=Metrics(queue, config.name),
            engine_died=lambda: bool(engine_client.errored),
            max_model_len=engine_client.model_config.max_model_len,
            chat=bool(getattr(engine_client.get_tokenizer(), "chat_template", None)),
            # By the provider that vLLM has made for its own spans, of the same endpoint.
            tracing=Tracing(trace.get_tracer("qpack.serve")) if config.otlp_traces_endpoint else None,
        )
        REGISTRY.register(RefusalCollector(self.registry))
        self._loop = asyncio.get_running_loop()
        self._tasks: list[asyncio.Task[None]] = []
        self._start(self._watch())
        if config.max_loras:
            self._start(self._follow())

    @property
    def takes_adapters(self) -> bool:
        """Whether the engine has slots for adapters."""
        return self.residency.capacity > 0

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(self._loop.create_task(work))

    async def _watch(self) -> None:
        """Tell the parent when the server accepts; stop the server when the engine is dead."""
        state = self._state
        while not (hasattr(state, "server") and state.server.started):
            await asyncio.sleep(0.02)
        self._parent.on_drain(self._drain_soon)
        self._parent.ready()
        while not self._engine.errored:
            await asyncio.sleep(_WATCH_SECONDS)
        self.gate.give_up()
        state.server.should_exit = True  # when those have been answered that are still here
        await asyncio.sleep(_LAST_ANSWERS_SECONDS)
        state.server.force_exit = True

    async def _follow(self) -> None:
        """Keep the engine in step with the registry, whichever process changes it."""
        seen = -1
        while True:
            if (generation := self.registry.generation()) != seen:
                seen = generation
                self.residency.follow(version for version in self.registry.versions() if not version.unservable)
            await asyncio.sleep(_FOLLOW_SECONDS)

    def _drain_soon(self) -> None:
        """Drain; for another thread."""
        self._loop.call_soon_threadsafe(lambda: self._start(self._drain()))

    async def _drain(self) -> None:
        """Let nobody in any more, wait for those inside, and end as vLLM ends on a signal."""
        self.gate.close("the server is shutting down")
        try:
            async with asyncio.timeout(self._drain_timeout):
                await self.gate.idle()
        except TimeoutError:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
