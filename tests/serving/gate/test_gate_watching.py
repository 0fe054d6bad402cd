"""What is told of requests: metrics by adapter, a line in the log for each, and what shadows would have answered."""

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from gated import BASE, TOKEN_SECONDS, Site, alias, site, until, version
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serve.gate.keys import Keys
from serve.gate.shadow import Heard
from serve.gate.tracing import Tracing

LABELS = {"adapter": "support", "version": "000000000000"}


def test_requests_and_tokens_by_adapter_and_status(running: Site) -> None:
    for _ in range(3):
        running.ask("one two", "support")
    for name in ("support", "billing"):
        running.ask("bad", name)
    running.ask("one")
    running.ask("crash-later b c", "support", stream=True)
    for name in ("made-up-1", "made-up-2"):
        running.ask(model=name)
    # The line is written when the client may have the answer already.
    until(lambda: running.figure("qpack_requests_total", adapter="", version="", status="404") == 2)
    assert running.figure("qpack_requests_total", **LABELS, status="200") == 3
    assert running.figure("qpack_requests_total", **LABELS, status="400") == 1
    assert running.figure("qpack_requests_total", **LABELS, status="error") == 1
    assert running.figure("qpack_requests_total", adapter=BASE, version="", status="200") == 1
    # Of the stream that broke off, what was estimated: a quarter of its bytes, and the pieces that came.
    assert 3 * 2 < (running.figure("qpack_prompt_tokens_total", **LABELS) or 0) < 3 * 2 + 40
    assert running.figure("qpack_output_tokens_total", **LABELS) == 3 * 4 + 2
    assert running.figure("qpack_prompt_tokens_total", adapter="billing", version="1" * 12) == 0, "it was refused"
    assert running.figure("qpack_queue_seconds_count", **LABELS) == 5
    assert running.figure("qpack_adapter_wait_seconds_count", **LABELS) == 5
    assert running.figure("qpack_adapter_wait_seconds_count", adapter=BASE, version="") is None
    with running.client() as http:
        text = http.get("/metrics").text
    assert "made-up" not in text
    assert 'qpack_requests_total{adapter="support",status="200",version="000000000000"} 3.0' in text


def test_figures_of_this_moment(running: Site) -> None:
    """What the page is told, by the names that models are asked by; nothing of what is not there."""
    for _ in range(2):
        running.ask("one two", "support", stream=True)
    running.ask("bad", "support")
    running.ask("one")
    running.ask(model="made-up")
    until(lambda: running.figure("qpack_requests_total", adapter="", version="", status="404") == 1)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(running.ask, "slow slow", "billing")
        until(lambda: running.queue.inside == 1)
        found = running.gate.figures()
        slow.result()
    assert (found["running"], found["waiting"], found["places"], found["slots"]) == (1, 0, 8, 2)
    assert found["holders"] == ["billing@111111111111"]
    assert found["models"].keys() == {"support@000000000000", BASE, "billing@111111111111"}
    support = found["models"]["support@000000000000"]
    assert (support["requests"], support["output_tokens"], support["first_tokens"]) == (3, 8, 2)
    assert TOKEN_SECONDS <= support["first_token_seconds"] / 2 < 5
    assert found["models"]["billing@111111111111"] == {"running": 1, "waiting": 0}


def test_times_of_streams(running: Site) -> None:
    streamed = LABELS | {"streamed": "true"}
    running.ask("slow slow", "support", stream=True)
    until(lambda: running.figure("qpack_time_per_output_token_seconds_count", **streamed) == 1)
    first = running.figure("qpack_time_to_first_token_seconds_sum", **LABELS)
    each = running.figure("qpack_time_per_output_token_seconds_sum", **streamed)
    assert first and each
    assert first >= 10 * TOKEN_SECONDS
    assert 9 * TOKEN_SECONDS < each < 30 * TOKEN_SECONDS
    running.ask("x", "support")
    assert running.figure("qpack_time_to_first_token_seconds_count", **LABELS) == 1, "not of whole answers"


def test_the_time_of_whole_answers_is_over_their_tokens(running: Site) -> None:
    """From the turn and the adapter on: what was waited is not in it."""
    running.residency.seconds["support@000000000000"] = 1.0
    running.ask("slow slow", "support")
    whole = LABELS | {"streamed": "false"}
    until(lambda: running.figure("qpack_time_per_output_token_seconds_count", **whole) == 1)
    each = running.figure("qpack_time_per_output_token_seconds_sum", **whole)
    assert each and 9 * TOKEN_SECONDS < each < 20 * TOKEN_SECONDS
    running.ask("bad", "support")
    running.ask("x", "support", stream=True)
    assert running.figure("qpack_time_per_output_token_seconds_count", **whole) == 1


def test_the_present_is_shown_by_adapter(tmp_path: Path) -> None:
    with site(tmp_path, slots=1, places=1) as running, ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(running.ask, "held", "support")]
        until(lambda: running.queue.inside == 1)
        asked += [pool.submit(running.ask, "x", model) for model in ("billing", "support")]
        until(lambda: running.queue.waiting == 2)
        other, base = {"adapter": "billing", "version": "1" * 12}, {"adapter": BASE, "version": ""}
        shown = {
            name: [running.figure(f"qpack_{name}", **labels) for labels in (LABELS, other, base)]
            for name in ("requests_waiting", "requests_running", "adapters_running", "adapter_swaps_total")
        }
        running.engine.let_go.set()
        assert all(one.result().status_code == 200 for one in asked)
    assert shown == {
        "requests_waiting": [1, 1, 0],
        "requests_running": [1, 0, 0],
        "adapters_running": [1, None, None],
        "adapter_swaps_total": [1, None, None],
    }
    assert running.figure("qpack_adapter_slots") == 1
    assert running.figure("qpack_adapter_swaps_total", **other) == 1
    assert running.figure("qpack_requests_running", **base) == 0, "there is a sum, also when nobody is here"


def test_a_client_that_has_its_answer_did_not_leave(running: Site) -> None:
    """The server says of such a client, too, that it has gone; the application may have something to do yet."""
    for streamed in (False, True):
        assert running.ask("linger", "support", stream=streamed).status_code == 200
    until(lambda: running.figure("qpack_requests_total", **LABELS, status="200") == 2)
    assert running.figure("qpack_requests_total", **LABELS, status="499") is None


def test_a_span_for_each_completion(tmp_path: Path) -> None:
    """Inside the client's, and what the application traces is inside ours."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    client = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with site(tmp_path, tracing=Tracing(provider.get_tracer("test"))) as running:
        running.residency.seconds["support@000000000000"] = 0.2
        running.ask("one two", "support", headers={"traceparent": client, "tracestate": "a=b", "x-request-id": "r-1"})
        running.ask("one", "nothing")
        with running.client() as http:
            http.get("/v1/models")
        running.ask("crash-later b c", stream=True)
        until(lambda: len(exporter.get_finished_spans()) == 3)
        inside = running.engine.traces[0]
    answered, unknown, broken = exporter.get_finished_spans()
    assert answered.name == "POST /v1/completions"
    assert answered.context and answered.parent
    assert f"{answered.context.trace_id:032x}-{answered.parent.span_id:016x}" == client[3:-3]
    assert inside == {"traceparent": f"00-{client[3:35]}-{answered.context.span_id:016x}-01", "tracestate": "a=b"}
    attributes = dict(answered.attributes or {})
    waits = [attributes.pop(f"qpack.{name}_seconds") for name in ("queue", "adapter_wait")]
    assert waits[0] < 0.2 <= waits[1] < 1  # type: ignore[operator]
    assert attributes == {
        "http.response.status_code": 200,
        "gen_ai.request.id": "r-1",
        "gen_ai.request.model": "support",
        "gen_ai.response.model": "support@000000000000",
        "gen_ai.usage.prompt_tokens": 2,
        "gen_ai.usage.completion_tokens": 4,
    }
    assert unknown.parent is None
    assert (unknown.attributes or {})["http.response.status_code"] == 404
    assert unknown.status.is_unset and not broken.status.is_ok
    assert broken.status.description == "the answer broke off, ask again"


def test_series_of_versions_that_are_gone_are_dropped(running: Site) -> None:
    for number in range(5):
        running.shelf.put(alias(version("support", f"{number}")))
        running.ask(model="support")
    running.ask()
    until(lambda: running.figure("qpack_requests_total", adapter=BASE, version="", status="200") == 1)
    with running.client() as http:
        text = http.get("/metrics").text
    assert 'version="4"' in text
    assert not any(f'version="{number}"' in text for number in range(4))


def test_a_line_for_every_request(running: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(Keys(tmp_path)) as keys:
        key, token = keys.add("team")
    with caplog.at_level(logging.INFO, "qpack.serve.access"):
        running.ask("one two", "support", token=token, headers={"x-request-id": "r-1"})
        running.ask("secret", "nothing", token=token)
        running.ask()
        with running.client(token) as http:
            http.get("/health")
            http.get("/v1/models")
        until(lambda: len(caplog.records) == 4)
    answered, unknown, closed, listed = [json.loads(record.message) for record in caplog.records]
    assert answered["request_id"] == "r-1"
    assert (answered["model"], answered["version"]) == ("support", "support@000000000000")
    assert (answered["status"], answered["key"]) == (200, f"team (qp-{key.id})")
    assert (answered["prompt_tokens"], answered["output_tokens"]) == (2, 4)
    assert answered["seconds"] >= answered["queue_seconds"] >= 0
    assert (unknown["status"], unknown["reason"]) == (404, "the model 'nothing' does not exist")
    assert unknown["version"] is None
    assert (closed["status"], closed["key"]) == (401, None)
    assert (listed["path"], listed["status"]) == ("/v1/models", 200)
    assert not any(token in record.message or "secret" in record.message for record in caplog.records)


def shadows(running: Site, result: str) -> float:
    return running.figure("qpack_shadow_answers_total", adapter="support", version="b", result=result) or 0


@pytest.mark.parametrize("streamed", [True, False])
def test_a_shadow_is_asked_and_not_heard(running: Site, streamed: bool) -> None:
    """The stand-in says its version, so that answers differ."""
    running.shelf.put(alias(version("support", "a"), shadow=version("support", "b")))
    answer = running.ask("hello", "support", stream=streamed)
    assert "support@a " in answer.text
    assert "support@b" not in answer.text
    until(lambda: shadows(running, "different") == 1)
    assert [asked["model"] for asked in running.engine.asked] == ["support@a", "support@b"]
    assert not running.engine.asked[1].get("stream")
    running.ask("hello", "support@a")
    running.ask("bad", "support")
    running.ask("hello", "billing")
    assert len(running.engine.asked) == 5, "only what the alias has answered is copied"
    assert running.figure("qpack_requests_total", adapter="support", version="b", status="200") is None


def test_a_shadow_that_says_the_same(running: Site) -> None:
    running.shelf.put(alias(version("support", "a"), shadow=version("support", "b")))
    for streamed in (True, False):
        running.ask("nameless hello", "support", stream=streamed)
    until(lambda: shadows(running, "same") == 2)


def test_a_shadow_that_fails_or_would_make_others_wait_is_counted(tmp_path: Path) -> None:
    with site(tmp_path, places=1) as running, ThreadPoolExecutor(2) as pool:
        running.shelf.put(alias(version("support", "a"), shadow=version("support", "b")))
        running.residency.broken.add("support@b")
        running.ask("hello", "support")
        until(lambda: shadows(running, "failed") == 1)
        running.residency.broken.clear()
        copied = pool.submit(running.ask, "slow", "support")
        until(lambda: running.queue.inside == 1)
        others = pool.submit(running.ask, "slow slow")
        until(lambda: shadows(running, "skipped") == 1)
        assert (copied.result().status_code, others.result().status_code) == (200, 200)


def test_nothing_is_copied_while_the_server_drains(tmp_path: Path) -> None:
    with site(tmp_path) as running, ThreadPoolExecutor(1) as pool:
        running.shelf.put(alias(version("support", "a"), shadow=version("support", "b")))
        last = pool.submit(running.ask, "held", "support")
        until(lambda: running.queue.inside == 1)
        running.call(running.gate.close, "the server is stopping")
        until(lambda: running.ask().status_code == 503)
        running.engine.let_go.set()
        assert last.result().status_code == 200
        time.sleep(5 * TOKEN_SECONDS)
        assert [asked["model"] for asked in running.engine.asked] == ["support@a"]


def test_texts_of_answers() -> None:
    def heard(text: str, *, streamed: bool = False) -> dict[int, str]:
        answer = Heard()
        for start in range(0, len(text), 7):
            answer.add(text[start : start + 7].encode())
        return answer.texts(streamed=streamed)

    assert heard('{"choices": [{"index": 0, "text": "a"}, {"index": 1, "text": "b"}]}') == {0: "a", 1: "b"}
    assert heard('{"choices": [{"index": 0, "message": {"content": "é"}}]}') == {0: "é"}
    call = '{"function": {"name": "f", "arguments": "{}"}}'
    assert heard(f'{{"choices": [{{"index": 0, "message": {{"content": null, "tool_calls": [{call}]}}}}]}}') == {
        0: "f{}"
    }
    event = 'data: {"choices": [{"index": 0, "delta": {"content": "x"}}]}\n\n'
    assert heard(f": keep-alive\n\n{event}{event}data: [DONE]\n\n", streamed=True) == {0: "xx"}
    with pytest.raises(KeyError):
        heard('{"error": {}}')
