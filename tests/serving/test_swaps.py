"""Versions that come and go under load, in the real engine: every answer is its version's, and no stream waits."""

import asyncio
import itertools
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served import MAX_TOKENS, Question, ServerProcess
from taught import PROMPTS

from serve.registry import Registry

pytestmark = pytest.mark.vllm


@pytest.fixture
def registry(server: ServerProcess) -> Iterator[Registry]:
    """The server's own registry, opened a second time."""
    server.wait_for("^ready ")
    with Registry.open(server.folder / "registry") as registry:
        yield registry


@pytest.fixture
def admin(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server.url}/v1", timeout=60) as client:
        yield client


def upload(admin: httpx.Client, name: str, adapter: Path, lora_alpha: int | None = None) -> str:
    """Upload an adapter's files, with another alpha if one is given, and return the version's id."""
    contents = {file.name: file.read_bytes() for file in adapter.iterdir()}
    if lora_alpha is not None:
        settings = json.loads(contents["adapter_config.json"]) | {"lora_alpha": lora_alpha}
        contents["adapter_config.json"] = json.dumps(settings).encode()
    files = [("file", content) for content in contents.items()]
    answer = admin.post(f"/adapters/{name}", files=files)
    assert answer.status_code == 201, answer.text
    version: str = answer.json()["id"]
    return version


def test_answers_during_swaps_are_each_versions_own(
    server: ServerProcess, adapters: dict[str, Path], expected: dict[Question, list[int]], admin: httpx.Client
) -> None:
    """Two slots, three places in memory, five versions under four names, one of which is flipped all the time."""
    turning = [upload(admin, "turning", adapters[name]) for name in ("alpha", "beta")]
    gamma = upload(admin, "gamma", adapters["alpha"])
    taught = dict(zip([*turning, gamma], ("alpha", "beta", "alpha"), strict=True))
    rng = random.Random(1)
    asked = [(rng.choice(["packed", "alpha", "beta", "gamma", "turning"]), rng.choice(PROMPTS)) for _ in range(300)]
    loads = admin.get("/adapters").json()
    assert {alias["name"] for alias in loads["aliases"]} == {"alpha", "beta", "gamma", "turning"}
    done = threading.Event()

    def flip() -> None:
        for version in itertools.cycle(turning):
            if done.wait(0.05):
                return
            answer = admin.post("/adapters/turning/promote", json={"version": version.partition("@")[2]})
            assert answer.status_code == 200, answer.text

    async def ask(client: openai.AsyncOpenAI, some: asyncio.Semaphore, model: str, prompt: str) -> tuple[str, Any]:
        async with some:
            answer = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=MAX_TOKENS,
                temperature=0,
                extra_body={"return_token_ids": True},
            )
            return answer.model, answer.choices[0].token_ids  # type: ignore[attr-defined]  # vLLM's extra field

    async def ask_all() -> list[tuple[str, Any]]:
        some = asyncio.Semaphore(32)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, some, *question) for question in asked))

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        answers = asyncio.run(ask_all())
    finally:
        done.set()
        thread.join()
    versions = set()
    for (model, prompt), (version, tokens) in zip(asked, answers, strict=True):
        name = version.partition("@")[0]
        assert name == model
        versions.add(version)
        assert tokens == expected[taught.get(version, name), prompt], (version, prompt)
    assert set(turning) <= versions, "the name was never flipped"
    for name in ("turning", "gamma"):
        assert admin.delete(f"/adapters/{name}").status_code == 200


class Stream(threading.Thread):
    """Streams tokens of ``alpha`` until it is stopped, and notes when each came and how long after the one before."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__()
        self._url = f"{server.url}/v1"
        self._stopping = threading.Event()
        self._gaps: list[tuple[float, float]] = []

    def run(self) -> None:
        with openai.OpenAI(base_url=self._url, api_key="none", max_retries=0) as client:
            while not self._stopping.is_set():
                stream = client.completions.create(
                    model="alpha", prompt="hello", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
                )
                last = None
                for _ in stream:
                    now = time.monotonic()
                    if last is not None:
                        self._gaps.append((now, now - last))
                    last = now

    def largest_gap(self, begin: float, end: float) -> float:
        """The longest wait for a token that came between two moments."""
        return max(gap for came, gap in self._gaps if begin <= came <= end)

    def stop(self) -> None:
        self._stopping.set()
        self.join()


def _stored(registry: Registry, version: str) -> Path:
    [found] = [one for one in registry.versions() if one.id == version]
    return found.path / "adapter_model.safetensors"


STALL_SECONDS = 1.0


def test_no_stream_waits_for_slow_storage(
    server: ServerProcess, adapters: dict[str, Path], admin: httpx.Client, registry: Registry
) -> None:
    """The file of a version is a FIFO: whoever reads it waits until someone writes. In plain vLLM every stream stops.

    Five loads, each after a quiet spell; what is compared is the best of both, for on a busy machine single tokens come
    late at any time.
    """
    names = [f"slow{number}" for number in range(5)]
    files = {_stored(registry, upload(admin, name, adapters["beta"], lora_alpha=5)) for name in names}
    [file] = files  # the same content, so the same file
    content = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    quiet, loading = [], []
    stream = Stream(server)
    stream.start()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for name in names:
            began = time.monotonic()
            time.sleep(STALL_SECONDS)
            asked = time.monotonic()
            feed = threading.Timer(STALL_SECONDS, file.write_bytes, [content])
            feed.start()
            answer = client.completions.create(model=name, prompt="hello", max_tokens=4)
            answered = time.monotonic()
            assert answer.model.startswith(f"{name}@")
            assert answered - asked > STALL_SECONDS
            quiet.append(stream.largest_gap(began, asked))
            loading.append(stream.largest_gap(asked, answered))
            feed.join()
    stream.stop()
    assert min(loading) < min(quiet) + 0.05, (loading, quiet)
    for name in names:
        assert admin.delete(f"/adapters/{name}").status_code == 200


def test_a_load_that_fails_is_its_own_failure(
    server: ServerProcess, adapters: dict[str, Path], admin: httpx.Client, registry: Registry
) -> None:
    version = upload(admin, "broken", adapters["beta"], lora_alpha=6)
    file = _stored(registry, version)
    content = file.read_bytes()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for harm in (content[: len(content) // 2], None):
            file.unlink()
            if harm is not None:
                file.write_bytes(harm)
            with pytest.raises(openai.InternalServerError, match="broken can't be loaded now") as failed:
                client.completions.create(model="broken", prompt="hello", max_tokens=4)
            assert failed.value.status_code == 503
            assert client.completions.create(model="beta", prompt="hello", max_tokens=4).choices
        file.write_bytes(content)  # nothing of the failures is left
        assert client.completions.create(model="broken", prompt="hello", max_tokens=4).choices
    assert server.status("GET", "/health") == 200
    assert admin.delete("/adapters/broken").status_code == 200


def test_a_directory_is_followed(server: ServerProcess, adapters: dict[str, Path], admin: httpx.Client) -> None:
    def names() -> set[str]:
        return {alias["name"] for alias in admin.get("/adapters").json()["aliases"]}

    def until(served: bool) -> None:
        deadline = time.monotonic() + 30
        while ("watched" in names()) is not served:
            assert time.monotonic() < deadline, server.output[-2000:]
            time.sleep(0.1)

    shutil.copytree(adapters["beta"], server.folder / "watched" / "watched")
    until(True)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.completions.create(model="watched", prompt="hello", max_tokens=4)
        assert answer.model.startswith("watched@")
        shutil.rmtree(server.folder / "watched" / "watched")
        until(False)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="watched", prompt="hello", max_tokens=4)


def test_the_routes_manage_versions(adapters: dict[str, Path], admin: httpx.Client, server: ServerProcess) -> None:
    first, second = (upload(admin, "managed", adapters[name]) for name in ("alpha", "beta"))

    def live() -> str:
        [alias] = [alias for alias in admin.get("/adapters").json()["aliases"] if alias["name"] == "managed"]
        return str(alias["live"])

    def resident() -> set[str]:
        return {version["id"] for version in admin.get("/adapters").json()["versions"] if version["resident"]}

    assert live() == second
    assert admin.post("/adapters/managed/rollback").json()["live"] == first
    assert admin.post("/adapters/managed/promote", json={"version": second.partition("@")[2]}).json()["live"] == second
    canary = admin.post("/adapters/managed/canary", json={"percents": {first.partition("@")[2]: 5}})
    assert canary.json()["canaries"] == {first: 5}
    shadow = admin.post("/adapters/managed/shadow", json={"version": first.partition("@")[2]})
    assert shadow.json()["shadow"] == first
    assert admin.post("/adapters/managed/pin", json={"version": first.partition("@")[2]}).json()["pinned"]
    deadline = time.monotonic() + 10
    while first not in resident():
        assert time.monotonic() < deadline
        time.sleep(0.05)

    refused = admin.post("/adapters/managed", files=[("file", ("adapter_config.json", b"{}"))])
    assert refused.status_code == 422
    assert refused.json()["error"]["message"].startswith("adapter_")
    assert admin.post("/adapters/managed", files=[("file", ("../x", b""))]).status_code == 400
    assert admin.post("/adapters/a b", files=[("file", ("adapter_config.json", b"{}"))]).status_code == 400
    assert admin.delete("/adapters/nobody").status_code == 404
    assert admin.post("/adapters/managed", content=iter([b"x"])).status_code == 411
    assert admin.delete("/adapters/managed").json() == {"removed": [first, second]}
    while first in resident():
        assert time.monotonic() < deadline
        time.sleep(0.05)
