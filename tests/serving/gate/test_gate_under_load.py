"""What happens to requests while others are there, clients leave, and the engine fails: through real HTTP."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gated import BASE, Site, alias, site, until, version

from serve.gate.keys import Keys
from serve.gate.limits import RequestLimits


def at_rest(running: Site) -> bool:
    return (running.queue.inside, running.queue.waiting, running.engine.running, running.residency.leased) == (
        0,
        0,
        0,
        [],
    )


def test_one_request_among_a_flood_with_one_slot(tmp_path: Path) -> None:
    """60 requests for one adapter, 2 at a time; one for another waits for a turn, and every answer is its version's."""
    with site(tmp_path, places=2, slots=1, quantum=0.3) as running, ThreadPoolExecutor(61) as pool:
        flood = [pool.submit(running.ask, "one two", "support") for _ in range(60)]
        until(lambda: running.queue.waiting > 50)
        one = pool.submit(running.ask, "hello", "billing")
        assert one.result().json()["model"] == "billing@111111111111"
        left = sum(not request.done() for request in flood)
        assert left > 20, "the flood is far from over"
        assert all(request.result().json()["model"] == "support@000000000000" for request in flood)
        assert running.engine.most_adapters == 1
        until(lambda: at_rest(running))


def test_slots_bound_the_adapters_in_the_engine(tmp_path: Path) -> None:
    names = [f"a{n}" for n in range(8)]
    with site(tmp_path, names=names, slots=3, quantum=0.02) as running, ThreadPoolExecutor(40) as pool:
        asked = [f"a{n % 8}" if n % 9 else BASE for n in range(120)]
        for model, answer in zip(asked, pool.map(lambda model: running.ask("x", model), asked), strict=True):
            assert answer.json()["model"].split("@")[0] == model
        assert 1 <= running.engine.most_adapters <= 3


def test_a_full_queue_is_429_with_a_time_to_come_back(tmp_path: Path) -> None:
    with site(tmp_path, places=1, limits=RequestLimits(max_waiting=2)) as running, ThreadPoolExecutor(8) as pool:
        held = [pool.submit(running.ask, "held") for _ in range(3)]
        until(lambda: (running.queue.inside, running.queue.waiting) == (1, 2))
        refused = [running.ask() for _ in range(5)]
        running.engine.let_go.set()
        assert [request.result().status_code for request in held] == [200] * 3
    assert [answer.status_code for answer in refused] == [429] * 5
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert refused[0].json()["error"]["type"] == "RateLimitError"


def test_at_a_time(running: Site, tmp_path: Path) -> None:
    with closing(Keys(tmp_path)) as keys:
        _, token = keys.add("a", concurrency=2)
    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(running.ask, "held", token=token) for _ in range(2)]
        until(lambda: running.queue.inside == 2)
        assert [running.ask(token=token).status_code for _ in range(2)] == [429] * 2
        running.engine.let_go.set()
        assert [request.result().status_code for request in held] == [200] * 2
    assert running.ask(token=token).status_code == 200


def test_weights_of_adapters_and_of_keys(tmp_path: Path) -> None:
    """While a request holds the only place, eight wait on either side; those of weight 3 get three places of four."""
    with closing(Keys(tmp_path)) as keys:
        tokens = {"heavy": keys.add("heavy", weight=3.0)[1], "light": keys.add("light")[1]}
    limits = RequestLimits(weights={"support": 3.0})

    def first_eight(*sides: tuple[str, str, str]) -> list[str]:
        with site(tmp_path, places=1, limits=limits) as running, ThreadPoolExecutor(17) as pool:
            pool.submit(running.ask, "held", token=tokens["light"])
            until(lambda: running.queue.inside == 1)
            for prompt, model, key in sides * 8:
                pool.submit(running.ask, prompt, model, tokens[key])
            until(lambda: running.queue.waiting == 16)
            running.engine.let_go.set()
            until(lambda: len(running.engine.asked) == 9)
            return sorted(asked["prompt"] for asked in running.engine.asked[1:9])

    assert first_eight(("a", "support", "light"), ("b", "billing", "light")) == ["a"] * 6 + ["b"] * 2
    assert first_eight(("a", "billing", "heavy"), ("b", "billing", "light")) == ["a"] * 6 + ["b"] * 2


def test_tokens_are_shared_as_they_were_used(tmp_path: Path) -> None:
    """Estimates are alike; of two keys, one's answers have four tokens and the other's some hundred."""
    with closing(Keys(tmp_path)) as keys:
        _, few = keys.add("few")
        _, many = keys.add("many")
    with site(tmp_path, places=1) as running, ThreadPoolExecutor(17) as pool:
        pool.submit(running.ask, "held", token=few)
        until(lambda: running.queue.inside == 1)
        for _ in range(8):
            pool.submit(running.ask, "x", token=few)
            pool.submit(running.ask, " ".join("y" * 60), token=many)
        until(lambda: running.queue.waiting == 16)
        running.engine.let_go.set()
        until(lambda: len(running.engine.asked) >= 9)
        assert sum(asked["prompt"] == "x" for asked in running.engine.asked[1:9]) >= 6


def test_a_client_cannot_ask_for_more_time_than_there_is(tmp_path: Path) -> None:
    with site(tmp_path, limits=RequestLimits(request_timeout=0.3)) as running:
        assert running.ask("held", headers={"x-request-timeout": "60"}).status_code == 504


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_its_place(running: Site, streamed: bool) -> None:
    with running.client() as http:
        body = {"prompt": " ".join(["slow"] * 100), "model": "support", "stream": streamed}
        if streamed:
            with http.stream("POST", "/v1/completions", json=body) as stream:
                pieces = stream.iter_bytes()
                next(pieces)
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=1)
    until(lambda: at_rest(running))
    assert running.engine.aborted == 1
    labels = {"adapter": "support", "version": "000000000000", "status": "499"}
    until(lambda: running.figure("qpack_requests_total", **labels) == 1)


def test_a_client_that_leaves_the_line_is_never_asked_for(tmp_path: Path) -> None:
    with site(tmp_path, places=1) as running, ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.ask, "held")
        until(lambda: running.queue.inside == 1)
        with pytest.raises(httpx.ReadTimeout), running.client() as http:
            http.post("/v1/completions", json={"prompt": "gone"}, timeout=0.1)
        running.engine.let_go.set()
        assert first.result().status_code == 200
        until(lambda: at_rest(running))
        assert [asked["prompt"] for asked in running.engine.asked] == ["held"]


def test_deadlines(tmp_path: Path) -> None:
    limits = RequestLimits(queue_timeout=0.3, request_timeout=5)
    with site(tmp_path, places=1, limits=limits) as running, ThreadPoolExecutor(1) as pool:
        late = running.ask("held", headers={"x-request-timeout": "0.2"})
        assert (late.status_code, late.json()["error"]["type"]) == (504, "APITimeoutError")
        stream = running.ask(" ".join(["slow"] * 30), headers={"x-request-timeout": "1"}, stream=True)
        *events, error, done = [line.removeprefix("data: ") for line in stream.text.split("\n\n") if line]
        assert events
        assert json.loads(error)["error"]["code"] == 504
        assert done == "[DONE]"
        until(lambda: at_rest(running))
        assert running.engine.aborted == 2, "the engine does not go on"

        first = pool.submit(running.ask, "held")
        until(lambda: running.queue.inside == 1)
        waited = running.ask("x")
        assert (waited.status_code, waited.headers["retry-after"]) == (503, "1")
        assert running.ask("x", headers={"x-request-timeout": "0.05"}).status_code == 504
        running.engine.let_go.set()
        assert first.result().status_code == 200
        for wrong in ("soon", "0", "-1", "nan", "inf"):
            assert running.ask("x", headers={"x-request-timeout": wrong}).status_code == 400


def test_a_slow_load_delays_nobody_else(tmp_path: Path) -> None:
    with site(tmp_path, places=2) as running, ThreadPoolExecutor(8) as pool:
        running.residency.seconds["support@000000000000"] = 2.0
        slow = [pool.submit(running.ask, "x", "support") for _ in range(6)]
        until(lambda: running.queue.waiting == 5)
        for model in (BASE, "billing", BASE, "billing"):
            assert running.ask("x", model).status_code == 200
        assert not any(request.done() for request in slow)
        assert [request.result().status_code for request in slow] == [200] * 6


def test_a_failed_load_is_a_503_that_tells_no_paths(running: Site) -> None:
    running.residency.broken.add("support@000000000000")
    refused = running.ask(model="support")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert refused.json()["error"]["message"] == "support can't be loaded now, ask again"
    assert running.ask(model="billing").status_code == 200
    until(lambda: at_rest(running))


def test_a_version_that_leaves_before_its_turn_is_followed_by_the_next(running: Site) -> None:
    """As when an alias is flipped and the old version removed while a request waits for it."""
    old = "support@000000000000"
    running.residency.seconds[old], running.residency.broken = 0.2, {old}
    with ThreadPoolExecutor(2) as pool:
        by_name, by_id = pool.submit(running.ask, "x", "support"), pool.submit(running.ask, "x", old)
        until(lambda: running.queue.inside > 0)
        running.shelf.put(alias(version("support", "b")))
        assert by_name.result().json()["model"] == "support@b"
        assert by_id.result().status_code == 404


def test_a_drain(running: Site) -> None:
    with ThreadPoolExecutor(2) as pool:
        request = pool.submit(running.ask, "held", "support")
        until(lambda: running.engine.running == 1)
        running.call(running.gate.close, "the server is stopping")
        until(lambda: running.ask().status_code == 503)
        refused = running.ask()
        assert refused.json()["error"]["message"] == "the server is stopping"
        assert int(refused.headers["retry-after"]) > 0
        with running.client() as http:
            assert http.get("/health").status_code == 503
            assert http.post("/adapters").status_code == 503
            assert http.get("/metrics").status_code == 200, "one can still watch"
        idle = asyncio.run_coroutine_threadsafe(running.gate.idle(), running.loop)
        assert not idle.done()
        running.engine.let_go.set()
        assert request.result().status_code == 200
        idle.result(timeout=5)


def test_the_openai_package_understands_all_of_it(tmp_path: Path) -> None:
    """What else it may be told is in test_gate_completions.py and test_gate_access.py."""
    limits = RequestLimits(max_waiting=1, max_body_bytes=2000)
    with (
        site(tmp_path, places=1, limits=limits) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client,
        ThreadPoolExecutor(2) as pool,
    ):

        def refused(expected: type[openai.APIStatusError], **options: Any) -> tuple[int, str | None, str]:
            with pytest.raises(expected) as caught:
                client.completions.create(**{"model": "support", "prompt": "x", **options})
            assert caught.value.type
            return caught.value.status_code, caught.value.response.headers.get("retry-after"), caught.value.type

        assert refused(openai.BadRequestError, n=99) == (400, None, "BadRequestError")
        assert refused(openai.APIStatusError, prompt="x" * 3000) == (413, None, "RequestTooLargeError")
        busy = pool.submit(running.ask, "held")
        until(lambda: running.queue.inside == 1)
        late = {"x-request-timeout": "0.05"}
        assert refused(openai.InternalServerError, extra_headers=late) == (504, None, "APITimeoutError")
        waits = pool.submit(running.ask, "x")
        until(lambda: running.queue.waiting == 1)
        assert refused(openai.RateLimitError)[::2] == (429, "RateLimitError")
        running.engine.dead = True
        assert refused(openai.InternalServerError) == (503, "10", "ServiceUnavailableError")
        running.engine.dead = False
        running.call(running.gate.close, "the server is stopping")
        until(lambda: running.ask().status_code == 503)
        assert refused(openai.InternalServerError) == (503, "5", "ServiceUnavailableError")
        running.engine.let_go.set()
        assert (busy.result().status_code, waits.result().status_code) == (200, 200)


def test_a_dead_engine_is_a_503(running: Site) -> None:
    answer = running.ask("die", "support")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
    assert answer.json()["error"]["message"] == "the engine died and is being restarted, ask again"
    assert answer.json()["error"]["type"] == "ServiceUnavailableError"


def test_a_stream_of_an_engine_that_dies_ends_with_a_clear_error(running: Site) -> None:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        heard = ""
        with pytest.raises(openai.APIError, match="the engine died and is being restarted, ask again"):
            for part in client.completions.create(model="support", prompt="a die-later b c", stream=True):
                heard += part.choices[0].text
    assert heard == "support@000000000000 says "


def test_nobody_is_heard_once_the_engine_is_dead(running: Site) -> None:
    *_, error, done, end = running.ask("die-later b c", stream=True).text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503
    assert (done, end) == ("data: [DONE]", "")
    with running.client() as http:
        assert http.post("/v1/completions", content=b"not even JSON").status_code == 503


def test_a_stream_that_breaks_off_says_so(running: Site) -> None:
    *_, error, done, end = running.ask("crash-later b c", stream=True).text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == "the answer broke off, ask again"
    assert (done, end) == ("data: [DONE]", "")
    until(lambda: at_rest(running))


def test_a_fault_of_the_application_is_its_own_500(running: Site) -> None:
    assert running.ask("crash").status_code == 500
    assert running.ask("x").status_code == 200
    until(lambda: at_rest(running))


def test_nothing_is_left_after_a_storm(tmp_path: Path) -> None:
    """Clients that leave at any moment, adapters that change, loads that fail: in the end all is as at first."""
    stop = threading.Event()
    with site(tmp_path, places=3, quantum=0.02, limits=RequestLimits(max_waiting=20)) as running:
        running.residency.seconds["billing@111111111111"] = 0.02

        def swap() -> None:
            number = 0
            while not stop.wait(0.02):
                number += 1
                running.call(running.shelf.put, alias(version("support", f"{number}")))

        def client(n: int) -> int:
            with running.client() as http:
                model = ("support", "billing", BASE)[n % 3]
                try:
                    body = {"model": model, "prompt": "slow" if n % 5 == 0 else "x", "stream": n % 2 == 0}
                    answer = http.post("/v1/completions", json=body, timeout=0.01 + (n * 7 % 40) / 100)
                except httpx.TimeoutException:
                    return 0
            if answer.status_code == 200:
                assert f"{model}" in answer.text.split(" says ")[0]
            return answer.status_code

        swapping = threading.Thread(target=swap)
        swapping.start()
        with ThreadPoolExecutor(24) as pool:
            statuses = list(pool.map(client, range(300)))
        stop.set()
        swapping.join()
        assert set(statuses) <= {0, 200, 429}
        assert 200 in statuses
        until(lambda: at_rest(running))
        assert running.ask(model="support").status_code == 200


def test_who_waits_when_the_engine_dies_is_told(tmp_path: Path) -> None:
    """One waits for its adapter, another one for the slot."""
    with site(tmp_path, slots=1) as running, ThreadPoolExecutor(2) as pool:
        running.residency.seconds["support@000000000000"] = 60
        waiting = [pool.submit(running.ask, "hello", "support")]
        until(lambda: running.queue.inside == 1)
        waiting.append(pool.submit(running.ask, "hello", "billing"))
        until(lambda: running.queue.waiting == 1)
        running.engine.dead = True
        running.call(running.gate.give_up)
        for answer in (one.result(10) for one in waiting):
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "the engine died and is being restarted, ask again"
        until(lambda: at_rest(running))
