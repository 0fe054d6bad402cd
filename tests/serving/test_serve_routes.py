"""The fence around the routes, with an application behind it that answers everything."""

import asyncio
import json
from typing import Any

import pytest

from serve.routes import ALLOWED, AllowedRoutes, Message, Receive, Send


async def _yes(scope: Message, receive: Receive, send: Send) -> None:
    await send({"type": "reached"})


def _ask(scope: dict[str, Any]) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("nothing to receive")

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(AllowedRoutes(_yes)(scope, receive, send))
    return sent


@pytest.mark.parametrize(("method", "path"), sorted(ALLOWED))
def test_allowed(method: str, path: str) -> None:
    assert _ask({"type": "http", "method": method, "path": path}) == [{"type": "reached"}]


@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/adapters/support", "/v1/adapters/support/promote"])
def test_all_below_adapters_is_ours(path: str) -> None:
    assert _ask({"type": "http", "method": "POST", "path": path}) == [{"type": "reached"}]


def test_lifespan_reaches_the_application() -> None:
    assert _ask({"type": "lifespan"}) == [{"type": "reached"}]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/adapters"),
        ("POST", "/v1/adapters-of-others"),
        ("POST", "/invocations"),
        ("POST", "/v1/models"),
        ("GET", "/v1/models/"),
        ("GET", "//v1/models"),
        ("GET", "/metrics/x"),
        ("OPTIONS", "/v1/completions"),
    ],
)
def test_everything_else_is_not_found(method: str, path: str) -> None:
    start, body = _ask({"type": "http", "method": method, "path": path})
    assert start["status"] == 404
    assert json.loads(body["body"])["error"]["message"] == f"{method} {path} is not served here"


def test_websockets_are_closed() -> None:
    assert _ask({"type": "websocket", "path": "/v1/realtime"}) == [{"type": "websocket.close", "code": 1008}]
