"""The entry point ``vllm.endpoint_plugins``: what vLLM's server is told once it is built, in the API process.

vLLM calls `Endpoint.init_state` between making the engine and accepting. It finds in ``args.qpack`` what
`serve.engine` has put there, and starts what runs beside the requests: word to the parent when the server accepts, the
end of a server whose engine is dead, and the drain.
"""

import asyncio
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from serve.config import ServeConfig
from serve.control import Parent

# vLLM itself looks every five seconds; requests that come meanwhile would wait for nothing.
_WATCH_SECONDS = 0.25

_LAST_ANSWERS_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Serving:
    """What the plugin needs of the process that it runs in."""

    config: ServeConfig
    parent: Parent


class Endpoint:
    """vLLM's ``EndpointPlugin``."""

    name = "qpack"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add no routes."""

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Start what runs beside the requests, for as long as the event loop does."""
        serving: Serving = args.qpack
        state.qpack = asyncio.create_task(_watch(engine_client, state, serving.parent))


async def _watch(engine_client: Any, state: Any, parent: Parent) -> None:
    """Tell the parent when the server accepts; stop the server when the engine is dead."""
    while not (hasattr(state, "server") and state.server.started):
        await asyncio.sleep(0.02)
    parent.ready()
    while not engine_client.errored:
        await asyncio.sleep(_WATCH_SECONDS)
    state.server.should_exit = True  # when those have been answered that are still here
    await asyncio.sleep(_LAST_ANSWERS_SECONDS)
    state.server.force_exit = True
