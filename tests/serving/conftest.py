"""A tiny base that knows six answers by heart, and two adapters, trained by qpack, that know others."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from collector import Collector
from gated import Site, site
from peft import PeftModel
from served import MAX_TOKENS, Question, ServerProcess
from taught import ANSWERS, PROMPTS, teach_adapter, teach_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve.gate.keys import Keys


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Site]:
    """The gate before a stand-in for vLLM."""
    with site(tmp_path) as made:
        yield made


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keys]:
    """What ``qpack keys`` has open while the server runs."""
    with closing(Keys(tmp_path)) as opened:
        yield opened


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama taught in full, then packed. Read only."""
    return teach_base(tmp_path_factory.mktemp("taught"))


@pytest.fixture(scope="session")
def adapters(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters for it, of different ranks. Read only."""
    folder = tmp_path_factory.mktemp("adapters")
    ranks = {"alpha": 8, "beta": 4}
    return {name: teach_adapter(packed, ANSWERS[name], folder / name, r=r) for name, r in ranks.items()}


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Where ``server`` sends its traces."""
    with Collector() as started:
        yield started


@pytest.fixture(scope="session")
def server(
    packed: Path, adapters: dict[str, Path], collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """The base and both adapters: two slots, room for three versions in memory, a registry, a watched directory.

    Verbose, so that it lists its routes.
    """
    folder = tmp_path_factory.mktemp("server")
    (folder / "watched").mkdir()
    options = ("--registry", str(folder / "registry"), "--adapters", str(folder / "watched"), "--verbose")
    room = ("--max-loras", "2", "--max-cpu-loras", "3")
    # A model of 1.4 M parameters might go on with blanks for ever.
    structured = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})
    tools = ("enable-auto-tool-choice", "tool-call-parser=hermes", f"structured-outputs-config={structured}")
    vllm = [f"--vllm={option}" for option in tools]
    traces = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"}
    process = ServerProcess(
        folder, packed, adapters, *options, *room, *vllm, "--otlp-traces-endpoint", collector.url, **traces
    )
    yield process
    process.close()


@pytest.fixture(scope="session")
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
