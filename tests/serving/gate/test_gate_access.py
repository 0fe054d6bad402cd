"""Who gets in: every route against every kind of key, and without keys who is near."""

import asyncio
import re
from pathlib import Path

import openai
import pytest
from gated import BASE, Site, site

from serve.gate.access import MODEL, OPENED, PUBLIC, is_loopback
from serve.gate.gate import GateMiddleware
from serve.gate.keys import Keys, Role
from serve.routes import ALLOWED, Message, Receive, Send

OTHERS = {("GET", "/v1/adapters"), ("POST", "/adapters"), ("POST", "/invocations"), ("DELETE", "/adapters/alpha")}
ROUTES = sorted(ALLOWED | OTHERS)


def status(running: Site, method: str, path: str, token: str | None = None, **headers: str) -> int:
    with running.client(token, **headers) as client:
        body = {"prompt": "hello"} if "completions" in path else None
        return client.request(method, path, json=body).status_code


def test_no_route_is_forgotten() -> None:
    """Which key opens a route is written down for every route that is served, or it is for admins."""
    assert PUBLIC == {("GET", "/health")}
    assert ALLOWED - PUBLIC == set().union(*OPENED.values()) - {("GET", MODEL)}, "which the gate itself answers"


def test_with_keys_every_route_needs_one(running: Site, keys: Keys) -> None:
    _, inference = keys.add("inference")
    _, monitor = keys.add("monitor", Role.MONITOR)
    _, admin = keys.add("admin", Role.ADMIN)
    for method, path in ROUTES:
        if (method, path) in PUBLIC:
            assert status(running, method, path) == 200
            continue
        for wrong in (None, "x", inference[:-1], f"{inference}x"):
            assert status(running, method, path, wrong) == 401, (method, path)
        for role, token in (("inference", inference), ("monitor", monitor)):
            opened = (method, path) in OPENED[Role(role)]
            assert status(running, method, path, token) == (200 if opened else 403), (method, path, role)
        assert status(running, method, path, admin) in (200, 404)  # what the application makes of it
    assert running.engine.asked, "and those that are let in are answered"


def test_other_ways_to_say_the_key_are_none(running: Site, keys: Keys) -> None:
    _, token = keys.add("a")
    for wrong in (token, f"Basic {token}", "Bearer", f"Bearer {token} {token}"):
        assert status(running, "GET", "/v1/models", authorization=wrong) == 401
    assert status(running, "GET", f"/v1/models?api_key={token}") == 401
    for right in (f"Bearer {token}", f"bearer {token}"):
        assert status(running, "GET", "/v1/models", authorization=right) == 200


def test_new_and_revoked_keys_are_seen_at_once(running: Site, keys: Keys) -> None:
    assert status(running, "GET", "/v1/models") == 200
    _, token = keys.add("a")
    assert status(running, "GET", "/v1/models") == 401
    assert status(running, "GET", "/v1/models", token) == 200
    keys.revoke("a")
    assert status(running, "GET", "/v1/models", token) == 401
    assert status(running, "GET", "/v1/models") == 401, "and the server stays closed"


def test_the_openai_package_understands_refusals(running: Site, keys: Keys) -> None:
    _, token = keys.add("a", Role.MONITOR)
    for key, error in (("none", openai.AuthenticationError), (token, openai.PermissionDeniedError)):
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0) as client, pytest.raises(error):
            client.models.list()


def test_use_is_noted(running: Site, keys: Keys) -> None:
    _, token = keys.add("a")
    for _ in range(5):
        assert status(running, "GET", "/v1/models", token) == 200
    with running.client(token) as client:
        for _ in range(100):
            found = keys.find(token)
            if found and found.last_used:
                return
            client.get("/health")
    raise AssertionError("never noted")


def test_a_key_of_some_models_sees_no_others(running: Site, keys: Keys) -> None:
    _, token = keys.add("a", models=["support"])
    for model in ("support", "support@000000000000"):
        assert running.ask(model=model, token=token).status_code == 200
    unknown = running.ask(model="nothing", token=token)
    for model in ("billing", "billing@111111111111", BASE):
        refused = running.ask(model=model, token=token)
        assert refused.status_code == 404
        assert refused.json()["error"]["message"] == unknown.json()["error"]["message"].replace("nothing", model)
    assert running.ask(token=token).status_code == 404, "the base, which is what no model means"
    with running.client(token) as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["support", "support@000000000000"]
        assert client.get("/v1/models/support").json()["root"] == "support@000000000000"
        assert client.get("/v1/models/billing").status_code == client.get("/v1/models/nothing").status_code == 404


def test_without_keys_all_may_ask_and_this_machine_may_change(running: Site) -> None:
    for method, path in sorted(ALLOWED):
        assert status(running, method, path) == 200
    assert status(running, "POST", "/v1/adapters") == 200
    port = running.url.rsplit(":", 1)[1]
    assert status(running, "POST", "/v1/adapters", host=f"localhost:{port}") == 200
    assert status(running, "POST", "/v1/adapters", origin=f"http://127.0.0.1:{port}") == 200
    # A page of another origin that a browser on this machine shows, by its own name or by one that it points here.
    assert status(running, "POST", "/v1/adapters", origin="https://evil.example") == 403
    assert status(running, "POST", "/v1/adapters", host=f"evil.example:{port}") == 403
    assert status(running, "POST", "/v1/adapters", origin="null") == 403


def test_without_keys_other_machines_may_not_change(tmp_path: Path) -> None:
    with site(tmp_path, client_host="192.0.2.7") as running:
        assert status(running, "POST", "/v1/completions") == 200
        assert status(running, "GET", "/metrics") == 200
        for method, path in OTHERS:
            assert status(running, method, path) == 403, path
        with running.client() as client:
            message = client.post("/v1/adapters").json()["error"]["message"]
        assert re.search(r"without API keys .* \(qpack keys add\)", message)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_addresses_of_this_machine_alone(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "localhost.example", ""])
def test_addresses_that_others_reach(host: str) -> None:
    assert not is_loopback(host)


def test_only_http_passes() -> None:
    """WebSockets are closed; what the server tells the application of its start and end goes by."""
    reached, sent = [], []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        reached.append(scope["type"])

    async def receive() -> Message:
        raise AssertionError("nothing to receive")

    async def send(message: Message) -> None:
        sent.append(message)

    for kind in ("lifespan", "websocket"):
        asyncio.run(GateMiddleware(app)({"type": kind, "path": "/v1/realtime"}, receive, send))
    assert (reached, sent) == (["lifespan"], [{"type": "websocket.close", "code": 1008}])
