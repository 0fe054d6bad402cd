"""The real server, asked over HTTP: its answers against PEFT's token by token, its routes, and its ends."""

import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import factors
import httpx
import openai
import pytest
import torch
from browser import CHROMIUM, chromium
from playwright.sync_api import expect
from served import Question, ServerProcess, ask, stored, upload
from taught import ANSWERS, PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve.routes import ALLOWED, PAGE

pytestmark = pytest.mark.vllm

# Those of `serve.admin`.
ADAPTER_ROUTES = {
    ("GET", "/v1/adapters"),
    ("POST", "/v1/adapters/{name}"),
    ("POST", "/v1/adapters/{name}/promote"),
    ("POST", "/v1/adapters/{name}/rollback"),
    ("POST", "/v1/adapters/{name}/pin"),
    ("POST", "/v1/adapters/{name}/canary"),
    ("POST", "/v1/adapters/{name}/shadow"),
    ("DELETE", "/v1/adapters/{model}"),
}

# What vLLM 0.32 mounts besides; a name that is new here wants a decision, not just an entry.
DENIED = {
    ("GET", "/docs"),
    ("GET", "/docs/oauth2-redirect"),
    ("GET", "/kv_event_sources"),
    ("GET", "/load"),
    ("GET", "/openapi.json"),
    ("GET", "/ping"),
    ("GET", "/redoc"),
    ("GET", "/v1/responses/{response_id}"),
    ("HEAD", "/docs"),
    ("HEAD", "/docs/oauth2-redirect"),
    ("HEAD", "/openapi.json"),
    ("HEAD", "/redoc"),
    ("POST", "/detokenize"),
    ("POST", "/generative_scoring"),
    ("POST", "/inference/v1/abort_requests"),
    ("POST", "/inference/v1/generate"),
    ("POST", "/invocations"),
    ("POST", "/is_scaling_elastic_ep"),
    ("POST", "/ping"),
    ("POST", "/scale_elastic_ep"),
    ("POST", "/tokenize"),
    ("POST", "/v1/chat/completions/batch"),
    ("POST", "/v1/chat/completions/derender"),
    ("POST", "/v1/chat/completions/render"),
    ("POST", "/v1/completions/derender"),
    ("POST", "/v1/completions/render"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/v1/messages/render"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/responses/render"),
    ("POST", "/v1/responses/{response_id}/cancel"),
    ("POST", "/v1/systemone"),
}

# Mounted only with certain environment variables or options, and the most dangerous ones.
UNMOUNTED = {
    ("POST", "/adapters"),
    ("DELETE", "/adapters/alpha"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/collective_rpc"),
    ("POST", "/reset_prefix_cache"),
    ("POST", "/sleep"),
}


def test_models_are_the_base_and_the_adapters(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        models = [model.id for model in client.models.list()]
    assert models[:3] == ["packed", "alpha", "beta"]
    assert [model.partition("@")[0] for model in models[3:5]] == ["alpha", "beta"]


def test_unknown_models_are_not_found(server: ServerProcess, adapters: dict[str, Path]) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        for model in ("gamma", "../beta", str(adapters["beta"])):
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                client.completions.create(model=model, prompt="hello")


def test_chat_uses_the_template(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.chat.completions.create(
            model="alpha", messages=[{"role": "user", "content": "hello"}], max_tokens=3, temperature=0
        )
    # <|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n in a vocabulary of bytes and three specials
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("user\nhello\nassistant\n") + 3


def test_answers_are_pefts(server: ServerProcess, expected: dict[Question, list[int]]) -> None:
    for question, tokens in expected.items():
        assert ask(server, [question]) == [tokens]


def test_answers_in_one_batch_are_pefts(server: ServerProcess, expected: dict[Question, list[int]]) -> None:
    """Every slot is full and base requests run beside adapters: plain vLLM on CPU answers all of the base's wrongly."""
    questions = [*expected] * 3
    assert ask(server, questions) == [expected[question] for question in questions]


def test_files_are_read_once(server: ServerProcess, expected: dict[Question, list[int]]) -> None:
    """Loaded in place, as vLLM offers to, an adapter would be read again at every step."""
    question = ("alpha", PROMPTS[0])
    assert ask(server, [question]) == [expected[question]]
    [copy] = [found for home in server.staged for found in home.glob("alpha@*")]
    away = copy.rename(copy.with_name("away"))
    assert ask(server, [question]) == [expected[question]]
    away.rename(copy)


def test_engine_and_worker_are_one_process(server: ServerProcess) -> None:
    """On a CPU too: every process that imports vLLM costs seconds of the start and most of a GiB."""
    server.wait_for("^ready ")
    assert sum("VLLM" in process.name() for process in server.processes()) == 1


def test_a_change_of_the_head_is_served(server: ServerProcess, packed: Path, tmp_path: Path) -> None:
    """The head is the embedding's own matrix: the change of one must not become a change of the other."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 256, generator=generator) / 4, torch.randn(320, 4, generator=generator) / 4
    name = "base_model.model.lm_head.lora_{}.weight"
    factors.write(tmp_path / "head", {name.format("A"): a, name.format("B"): b}, lora_alpha=8)
    tokenizer: Any = AutoTokenizer.from_pretrained(packed)
    base: Any = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    ids = tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = base(ids, output_hidden_states=True)
    unchanged = output.logits[0, -1].float()
    expected = (unchanged + 2 * b @ (a @ output.hidden_states[-1][0, -1].float())).log_softmax(-1)
    with (
        httpx.Client(base_url=f"{server.url}/v1", timeout=60) as admin,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        upload(admin, "head", tmp_path / "head")
        answer = client.completions.create(
            model="head", prompt=PROMPTS[1], max_tokens=1, logprobs=5, extra_body={"return_tokens_as_token_ids": True}
        )
        assert admin.delete("/adapters/head").status_code == 200
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs
    for token, logprob in logprobs.top_logprobs[0].items():
        index = int(token.removeprefix("token_id:"))
        assert logprob == pytest.approx(float(expected[index]), abs=0.1)
    assert abs(expected - unchanged.log_softmax(-1)).max() > 1


def test_the_routes_are_known(server: ServerProcess) -> None:
    listed = re.findall(r"Route: (\S+), Methods: ([A-Z, ]+)", server.output)
    mounted = {(method, path) for path, methods in listed for method in methods.split(", ")}
    assert mounted == ALLOWED | ADAPTER_ROUTES | DENIED


def test_denied_routes_are_not_found(server: ServerProcess) -> None:
    for method, path in sorted(DENIED | UNMOUNTED):
        assert server.status(method, path) == 404, (method, path)


def test_routes_for_watching_answer(server: ServerProcess) -> None:
    for path in ("/health", "/version", "/metrics", "/v1/models", "/v1/adapters", *PAGE):
        assert server.status("GET", path) == 200, path


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_the_page_asks_all_at_once(server: ServerProcess) -> None:
    with chromium() as browser:
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_label("Prompt", exact=True).fill(PROMPTS[0])
        for model in ANSWERS:
            page.get_by_role("checkbox", name=model, exact=True).check()
        page.get_by_role("button", name="Ask").click()
        for model, answers in ANSWERS.items():
            article = page.get_by_role("article", name=model)
            expect(article.get_by_role("log")).to_have_text(answers[0], timeout=60_000)
            expect(article.locator(".version")).to_have_text(re.compile(f"^{model}(@[0-9a-f]{{12}})?$"))
        expect(page.get_by_role("rowheader", name=re.compile("^alpha answered by alpha@"))).to_be_visible()


@pytest.fixture(scope="module")
def crowded(
    packed: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Two adapters that share one slot, and the log as a user sees it."""
    folder = tmp_path_factory.mktemp("crowded")
    process = ServerProcess(folder, packed, adapters, "--max-loras", "1", "--registry", str(folder / "registry"))
    yield process
    process.close()


def test_answers_are_pefts_while_adapters_take_turns(
    crowded: ServerProcess, expected: dict[Question, list[int]]
) -> None:
    questions = [*expected] * 3
    assert ask(crowded, questions) == [expected[question] for question in questions]


def test_a_start_is_quiet_but_not_silent(crowded: ServerProcess) -> None:
    lines = [line for line in crowded.output.splitlines() if not line.startswith("{")]  # one of JSON for each request
    assert re.fullmatch(r"ready at http://127\.0\.0\.1:\d+/v1 with 2 adapters: alpha, beta", lines[-1])
    assert any(re.fullmatch(r"loading engine \.\.\. \d+ s", line) for line in lines)
    assert not re.search(r" (INFO|WARNING|ERROR) ", crowded.output)


def test_a_dead_engine_is_replaced(
    crowded: ServerProcess, adapters: dict[str, Path], expected: dict[Question, list[int]]
) -> None:
    """Killed in the middle of a stream and of a load: both end in an error, whoever asks next is told to wait, then all
    is well."""
    with httpx.Client(base_url=f"{crowded.url}/v1", timeout=60) as admin:
        file = stored(crowded, upload(admin, "late", adapters["beta"], lora_alpha=5))
    content = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    with (
        openai.OpenAI(base_url=f"{crowded.url}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        loading = pool.submit(client.completions.create, model="late", prompt="hello", max_tokens=4)
        feed = file.open("wb")  # opens when the other end does: from then on the load is under way
        stream = client.completions.create(
            model="packed", prompt="hello", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        crowded.kill_engine()
        with pytest.raises(openai.APIError, match="the engine died and is being restarted"):
            assert sum(1 for _ in stream) > 400
        with pytest.raises(openai.InternalServerError, match="the engine died and is being restarted"):
            loading.result()
        while crowded.status("GET", "/health") != 503:
            time.sleep(0.05)
        assert crowded.status("POST", "/v1/completions") == 503
        feed.close()
        file.unlink()
        file.write_bytes(content)
        crowded.wait_for(r"^the engine died; .* starting it again in 1 s$")
        crowded.wait_for(r"(?s)^ready .*^ready ")
        assert client.completions.create(model="late", prompt="hello", max_tokens=4).choices
    assert ask(crowded, [*expected]) == [*expected.values()]


def test_a_drain_finishes_what_has_begun(crowded: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{crowded.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model="beta",
            prompt="hello",
            max_tokens=480,
            n=4,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        crowded.send(signal.SIGTERM)
        while crowded.status("GET", "/health") != 503:
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError, match="the server is shutting down") as refused:
            client.completions.create(model="alpha", prompt="hello")
        assert refused.value.status_code == 503
        *_, last = stream
        assert last.usage is not None and last.usage.completion_tokens == 4 * 480
    assert crowded.wait() == 0
    assert "stopped" in crowded.output.splitlines()
