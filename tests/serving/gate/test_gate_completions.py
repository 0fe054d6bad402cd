"""What passes: models and versions, streams, limits, errors in OpenAI's shape."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gated import BASE, TOKEN_SECONDS, Site, alias, site, version

from qpack.errors import ServeError
from serve.gate.keys import Keys
from serve.gate.limits import RequestLimits

SUPPORT = "support@000000000000"


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path, limits=RequestLimits(max_body_bytes=2000, max_output_tokens=50, max_choices=4)) as made:
        yield made


@pytest.fixture
def client(running: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as opened:
        yield opened


def stream(running: Site, prompt: str, **body: Any) -> tuple[httpx.Response, list[Any]]:
    """The response, and what its events say."""
    response = running.ask(prompt, stream=True, **body)
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return response, [event if event == "[DONE]" else json.loads(event) for event in events]


@pytest.mark.parametrize(
    ("model", "version"),
    [(None, BASE), (BASE, BASE), ("support", SUPPORT), (SUPPORT, SUPPORT), ("billing", "billing@111111111111")],
)
def test_the_version_answers_and_says_so(running: Site, model: str | None, version: str) -> None:
    response = running.ask(model=model)
    assert response.json()["choices"][0]["text"] == f"{version} says hello "
    assert response.json()["model"] == response.headers["x-qpack-version"] == version


def test_the_openai_package_works_unchanged(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [BASE, "support", "billing", SUPPORT, "billing@111111111111"]
    assert client.models.retrieve("support").model_dump()["root"] == SUPPORT
    with pytest.raises(openai.NotFoundError, match="the model 'nothing' does not exist"):
        client.models.retrieve("nothing")
    chat: Any = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model="support", messages=chat)
    assert answer.choices[0].message.content == f"{SUPPORT} says hello "
    parts = client.chat.completions.create(model="support", messages=chat, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == f"{SUPPORT} says hello "
    with pytest.raises(openai.NotFoundError, match="the model 'nothing' does not exist"):
        client.completions.create(model="nothing", prompt="x")
    with pytest.raises(openai.BadRequestError, match="no such thing"):
        client.completions.create(model="support", prompt="bad")


def test_the_list_tells_versions_and_no_paths(running: Site) -> None:
    live, new = version("support", "a" * 12), version("support", "b" * 12)
    running.shelf.put(alias(live, {new: 5.0}))
    with running.client() as http:
        listed = http.get("/v1/models").json()
    cards = {card["id"]: card for card in listed["data"]}
    assert listed["object"] == "list"
    assert (cards[BASE]["root"], cards[BASE]["parent"], cards[BASE]["max_model_len"]) == (BASE, None, 128)
    assert (cards["support"]["root"], cards["support"]["parent"]) == (live.id, BASE)
    assert cards["support"]["canaries"] == {new.id: 5.0}
    assert cards[new.id]["root"] == new.id
    assert not any("/" in str(value) for card in cards.values() for value in card.values())


def test_what_the_client_sent_and_gets_is_left_alone(running: Site) -> None:
    """But for the model: odd fields reach the engine, and a stream has what was asked for and no more."""
    odd = {
        "prompt": "é\u2028",
        "seed": 2**63,
        "top_p": 0.1,
        "logit_bias": {"5": -1},
        "stop": ["\ud800"],
        "odd": [None, {}],
    }
    with running.client() as http:
        assert http.post("/v1/completions", content=json.dumps({**odd, "model": "support"})).status_code == 200
    assert running.engine.asked[-1] == {**odd, "model": SUPPORT}
    _, events = stream(running, "hello")
    assert [event["choices"][0]["text"] for event in events[:-1]] == [f"{BASE} ", "says ", "hello "]
    _, events = stream(running, "hello", stream_options={"include_usage": True})
    assert (events[-2]["choices"], events[-2]["usage"]["completion_tokens"]) == ([], 3)


def test_a_stream_is_passed_on_as_it_comes(running: Site) -> None:
    with (
        running.client() as http,
        http.stream("POST", "/v1/completions", json={"prompt": "slow", "stream": True}) as got,
    ):
        came = [time.monotonic() for _ in got.iter_bytes()]
    assert came[-1] - came[0] > 10 * TOKEN_SECONDS


@pytest.mark.parametrize("field", ["x-session-id", "session_id", "user"])
def test_a_canary_is_sticky_by_session_or_user(running: Site, field: str) -> None:
    live, new = version("support", "a"), version("support", "b")
    canary = alias(live, {new: 50.0})
    running.shelf.put(canary)
    sides = set()
    for name in "abcdefgh":
        named = {"headers": {field: name}} if field == "x-session-id" else {field: name}
        expected = canary.choose(name)
        assert [running.ask(model="support", **named).json()["model"] for _ in range(2)] == [expected.id] * 2
        sides.add(expected)
    assert sides == {live, new}


def test_a_request_ends_on_the_version_that_it_began_with(running: Site) -> None:
    with (
        running.client() as http,
        http.stream("POST", "/v1/completions", json={"prompt": "a b c", "model": "support", "stream": True}) as got,
    ):
        lines = got.iter_lines()
        next(lines)
        running.shelf.put(alias(version("support", "b")))
        assert running.ask(model="support").json()["model"] == "support@b"
        rest = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert {event["model"] for event in rest} == {SUPPORT}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"{", None, "the body is not JSON"),
        (b"[" * 1900, None, "the body is not JSON"),
        (b"\xff", None, "the body is not JSON"),
        (b"[]", None, "the body is not a JSON object but list"),
        (b'{"model": 5}', "model", "model is not a string"),
        (b'{"n": 5}', "n", "5 answers were asked for: n times prompts may be 4"),
        (b'{"n": 2, "prompt": ["a", "b", "c"]}', "n", "6 answers were asked for"),
        (b'{"best_of": 9}', "n", "9 answers were asked for"),
        (b'{"n": "9"}', "n", "n is not a number of 0 or more"),
        (b'{"n": 9.0}', "n", "n is not a number of 0 or more"),
        (b'{"n": true}', "n", "n is not a number of 0 or more"),
        (b'{"max_tokens": -1}', "max_tokens", "max_tokens is not a number of 0 or more"),
        (b'{"max_tokens": 51}', "max_tokens", "max_tokens 51: at most 50 are allowed"),
        (b'{"max_tokens": 9, "max_completion_tokens": 51}', "max_completion_tokens", "at most 50 are allowed"),
    ],
)
def test_bad_requests_are_refused_by_field(running: Site, body: bytes, param: str | None, message: str) -> None:
    with running.client() as http:
        response = http.post("/v1/completions", content=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("BadRequestError", 400, param)
    assert message in error["message"]
    assert not running.engine.asked


def test_what_is_just_allowed_passes(running: Site) -> None:
    assert running.ask(n=4, max_tokens=50, best_of=None).status_code == 200
    assert running.ask(max_tokens=None).status_code == 200


def test_a_large_body_is_refused_while_it_comes(running: Site) -> None:
    assert running.ask("x" * 3000).status_code == 413
    # In chunks, without a length: the answer comes although the body has no end.
    host, port = running.url.removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), timeout=10)) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(3):
            raw.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
        answer = b""
        while b"2000 bytes" not in answer and (piece := raw.recv(65536)):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"the body is larger than 2000 bytes" in answer
    assert not running.engine.asked


def test_a_body_that_does_not_come_is_not_waited_for(running: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.gate.exchange._BODY_SECONDS", 0.2)
    host, port = running.url.removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), timeout=10)) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
        answer = b""
        while piece := raw.recv(65536):  # until the connection is closed
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"the body did not come within" in answer


def test_request_ids_are_honoured_or_made(running: Site) -> None:
    assert running.ask(headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = running.ask(headers={"x-request-id": "a b\tc"}).headers["x-request-id"]
    assert len(made) == 32
    assert running.ask(model="nothing").headers["x-request-id"], "refusals too"
    assert running.engine.request_ids == ["abc-1", made], "and the engine knows them"


def test_requests_a_minute_and_at_a_time(running: Site, tmp_path: Path) -> None:
    with closing(Keys(tmp_path)) as keys:
        _, token = keys.add("a", requests_per_minute=3)
        _, other = keys.add("b")
    answers = [running.ask(token=token) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
    assert answers[-1].json()["error"]["message"] == "this key may send 3 requests a minute"
    assert running.ask(token=other).status_code == 200


def test_tokens_a_minute_are_those_that_were_used(running: Site, tmp_path: Path) -> None:
    """The estimate, some hundred tokens, is given back: many small requests fit; refused ones cost nothing."""
    with closing(Keys(tmp_path)) as keys:
        _, token = keys.add("a", tokens_per_minute=500)
    for _ in range(10):
        assert running.ask(token=token, model="support").status_code == 200
        assert running.ask(token=token, model="nothing").status_code == 404
        assert running.ask("bad", token=token).status_code == 400
    used = running.ask(" ".join("x" * 300), token=token)  # 300 tokens in, 302 out
    assert used.status_code == 200
    refused = running.ask(token=token)
    assert refused.status_code == 429
    assert refused.json()["error"]["message"] == "this key may use 500 tokens a minute"
    assert int(refused.headers["retry-after"]) > 40, "what was used beyond the estimate is owed"


@pytest.mark.parametrize("bad", [{"max_body_bytes": 0}, {"queue_timeout": float("nan")}, {"weights": {"a": -1.0}}])
def test_limits_that_nothing_could_pass_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ServeError, match="expected more than 0"):
        RequestLimits(**bad)
