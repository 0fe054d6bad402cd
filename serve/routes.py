"""The routes that clients can reach, as a list; everything else that vLLM mounts answers 404.

vLLM 0.32 mounts routes that answer without a key or steer the engine, such as ``/invocations`` and
``/scale_elastic_ep``, and with environment variables set also some that load adapters from any path, such as
``/adapters``. Denying those by name would let the next release's in, so what stays is named instead. The class is plain
ASGI and goes in through vLLM's ``--middleware``, which puts it outside of every route, mount and websocket.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

PAGE = (
    "/",
    "/page/house.css",
    "/page/style.css",
    "/page/icon.svg",
    "/page/page.js",
    "/page/adapters.js",
    "/page/api.js",
    "/page/dialog.js",
    "/page/element.js",
    "/page/figures.js",
    "/page/playground.js",
    "/page/units.js",
    "/page/upload.js",
)
"""The files of `serve.page`."""

ALLOWED = frozenset(
    {
        *(("GET", path) for path in PAGE),
        ("GET", "/health"),
        ("GET", "/version"),
        ("GET", "/metrics"),
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
    }
)

# All that is below is `serve.admin`'s.
ADAPTERS = "/v1/adapters"

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]


class AllowedRoutes:
    """ASGI middleware that passes `ALLOWED` on and answers 404, in OpenAI's form, to the rest."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        match scope:
            case {"type": "lifespan"}:
                await self.app(scope, receive, send)
            case {"type": "http", "method": method, "path": path} if (method, path) in ALLOWED or _is_ours(path):
                await self.app(scope, receive, send)
            case {"type": "http", "method": method, "path": path}:
                await _not_found(f"{method} {path} is not served here", send)
            case _:
                await send({"type": "websocket.close", "code": 1008})


def _is_ours(path: str) -> bool:
    return path == ADAPTERS or path.startswith(f"{ADAPTERS}/")


async def _not_found(message: str, send: Send) -> None:
    body = json.dumps({"error": {"message": message, "type": "NotFoundError", "param": None, "code": 404}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 404, "headers": headers})
    await send({"type": "http.response.body", "body": body})
