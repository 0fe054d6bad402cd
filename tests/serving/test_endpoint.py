"""The real server, asked over HTTP: its answers against PEFT's token by token, its routes, and its ends."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import httpx
import openai
import psutil
import pytest
import torch
from peft import PeftModel
from taught import ANSWERS, PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve.routes import ALLOWED

pytestmark = pytest.mark.vllm

MAX_TOKENS = 24

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


# Loading vLLM takes one to three minutes on two cores.
START_SECONDS = 400.0


class ServerProcess:
    """``qpack serve`` on a free port; what it writes goes to a file."""

    def __init__(self, log: Path, base: Path, adapters: dict[str, Path], *options: str) -> None:
        self._log = log
        command = [sys.executable, "-m", "qpack", "serve", str(base), "--port", "0", *options]
        for name, path in adapters.items():
            command += ["--adapter", f"{name}={path}"]
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB: plenty here, and seconds sooner
        environment.pop("VLLM_LOGGING_LEVEL", None)  # TRL sets it for all of a process that imports it
        with log.open("wb") as stream:
            self._process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)

    @property
    def output(self) -> str:
        """All that it has written."""
        return self._log.read_text(errors="replace")

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a line that matches; fail if the process ends without it."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            ended = self._process.poll() is not None
            if match := re.search(pattern, self.output, re.MULTILINE):
                return match
            assert not ended, f"the server ended with status {self._process.returncode}:\n{self.output}"
            time.sleep(0.25)
        raise AssertionError(f"no line {pattern!r} after {START_SECONDS:.0f} s:\n{self.output}")

    @property
    def url(self) -> str:
        """The address, as the server gives it when it is ready."""
        return self.wait_for(r"^ready at (http://\S+)/v1 ").group(1)

    def status(self, method: str, path: str) -> int:
        """Send a request with an empty object and return the status of the answer."""
        headers = {"Content-Type": "application/json"}
        request = Request(self.url + path, method=method, data=b"{}" if method == "POST" else None, headers=headers)
        try:
            with urlopen(request, timeout=60) as answer:
                return int(answer.status)
        except HTTPError as error:
            with error:
                return error.code

    def kill_engine(self) -> None:
        """Kill vLLM's engine process."""
        [engine] = [one for one in psutil.Process(self._process.pid).children(recursive=True) if "Engine" in one.name()]
        engine.kill()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Return the exit status; kill the process if it doesn't end within a minute."""
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise

    def close(self) -> None:
        """End the process if it still runs."""
        if self._process.poll() is None:
            self.stop()


@pytest.fixture(scope="module")
def server(
    packed: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """The base and both adapters, with a slot for each; verbose, so that it lists its routes."""
    process = ServerProcess(tmp_path_factory.mktemp("server") / "log", packed, adapters, "--verbose")
    yield process
    process.close()


Question = tuple[str, str]
"""A model and a prompt."""


@pytest.fixture(scope="module")
def expected(packed: Path, adapters: dict[str, Path]) -> dict[Question, list[int]]:
    """The greedy tokens of the base and of each adapter in PEFT; neighbours are of different models."""
    tokenizer: Any = AutoTokenizer.from_pretrained(packed)
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16), str(adapters["alpha"]), adapter_name="alpha"
    )
    model.load_adapter(str(adapters["beta"]), adapter_name="beta")
    model.eval()

    def generate(prompt: str) -> list[int]:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**ids, do_sample=False, max_new_tokens=MAX_TOKENS)
        tokens: list[int] = output[0, ids["input_ids"].shape[1] :].tolist()
        return tokens

    answers = {}
    for prompt in PROMPTS:
        with model.disable_adapter():
            answers[packed.name, prompt] = generate(prompt)
        for name in adapters:
            model.set_adapter(name)
            answers[name, prompt] = generate(prompt)
    taught = {
        (name, prompt): f"{answer}<|im_end|>"
        for name, texts in ANSWERS.items()
        for prompt, answer in zip(PROMPTS, texts, strict=True)
    }
    assert {question: tokenizer.decode(tokens) for question, tokens in answers.items()} == taught
    return answers


def ask(server: ServerProcess, questions: Sequence[Question]) -> list[list[int]]:
    """Ask all questions at the same time and return the tokens of the answers."""

    async def ask_all() -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=model,
                        messages=[{"role": "user", "content": prompt}],
                        max_tokens=MAX_TOKENS,
                        temperature=0,
                        extra_body={"return_token_ids": True},
                    )
                    for model, prompt in questions
                )
            )
        return [answer.choices[0].token_ids for answer in answers]  # type: ignore[attr-defined]  # vLLM's extra field

    return asyncio.run(ask_all())


def test_models_are_the_base_and_the_adapters(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["packed", "alpha", "beta"]


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


def test_the_routes_are_known(server: ServerProcess) -> None:
    listed = re.findall(r"Route: (\S+), Methods: ([A-Z, ]+)", server.output)
    mounted = {(method, path) for path, methods in listed for method in methods.split(", ")}
    assert mounted == ALLOWED | DENIED


def test_denied_routes_are_not_found(server: ServerProcess) -> None:
    for method, path in sorted(DENIED | UNMOUNTED):
        assert server.status(method, path) == 404, (method, path)


def test_routes_for_watching_answer(server: ServerProcess) -> None:
    for path in ("/health", "/version", "/metrics", "/v1/models"):
        assert server.status("GET", path) == 200, path


def test_a_signal_ends_the_server_cleanly(server: ServerProcess) -> None:
    assert server.stop(signal.SIGTERM) == 0
    assert "stopped" in server.output.splitlines()


@pytest.fixture(scope="module")
def crowded(
    packed: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Two adapters that share one slot, and the log as a user sees it."""
    process = ServerProcess(tmp_path_factory.mktemp("crowded") / "log", packed, adapters, "--max-loras", "1")
    yield process
    process.close()


def test_answers_are_pefts_while_adapters_take_turns(
    crowded: ServerProcess, expected: dict[Question, list[int]]
) -> None:
    questions = [*expected] * 3
    assert ask(crowded, questions) == [expected[question] for question in questions]


def test_a_start_is_quiet_but_not_silent(crowded: ServerProcess) -> None:
    lines = crowded.output.splitlines()
    assert re.fullmatch(r"ready at http://127\.0\.0\.1:\d+/v1 with 2 adapters: alpha, beta", lines[-1])
    assert any(re.fullmatch(r"loading engine \.\.\. \d+ s", line) for line in lines)
    assert not re.search(r" (INFO|WARNING|ERROR) ", crowded.output)


def test_a_dead_engine_is_replaced(crowded: ServerProcess, expected: dict[Question, list[int]]) -> None:
    """Killed in the middle of a stream: that breaks, whoever asks next is told to wait, and then all is as before."""
    with openai.OpenAI(base_url=f"{crowded.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model="alpha", prompt="hello", max_tokens=120, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        crowded.kill_engine()
        with pytest.raises((openai.APIError, httpx.RemoteProtocolError)):
            assert sum(1 for _ in stream) >= 119
            raise AssertionError("the stream came to its end")
    crowded.wait_for(r"^the engine died; .* starting it again in 1 s$")
    while crowded.status("GET", "/health") != 503:
        time.sleep(0.05)
    assert crowded.status("POST", "/v1/completions") == 503
    crowded.wait_for(r"(?s)^ready .*^ready ")
    assert ask(crowded, [*expected]) == [*expected.values()]
    assert crowded.stop(signal.SIGTERM) == 0
