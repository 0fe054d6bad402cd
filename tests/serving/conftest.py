"""A tiny base that knows six answers by heart, and two adapters, trained by qpack, that know others.

What a model knows by heart it answers with wide margins, so that its greedy tokens do not depend on how an engine
rounds: they can be compared one by one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from served import MAX_TOKENS, Question, ServerProcess
from taught import ANSWERS, PROMPTS
from tiny import write_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpack
from qpack.data import DataOptions, encode, read
from qpack.loading.tokenizer import load_tokenizer
from qpack.training import TrainSettings
from qpack.training.batches import collate, cut


def write_chats(path: Path, model: str) -> Path:
    """Write what ``model`` is taught as training data."""
    chats = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(PROMPTS, ANSWERS[model], strict=True)]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama taught in full, then packed. Read only.

    With the scales of ``best`` mode, half of them negative and in a map of their own: what is compared here with stock
    PEFT also shows that vLLM multiplies by them as it should.
    """
    folder = tmp_path_factory.mktemp("taught")
    source = write_llama(folder / "source")
    tokenizer = load_tokenizer(source)
    chats = read(write_chats(folder / "base.jsonl", "packed"))
    examples = encode(chats, tokenizer, source, DataOptions(), 128).examples
    [batch] = cut(collate(examples), len(examples))
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(80):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    model.to(torch.bfloat16).save_pretrained(source, max_shard_size="1MB")
    qpack.convert(source, folder / "packed", mode="best")
    return folder / "packed"


@pytest.fixture(scope="session")
def adapters(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters for it, of different ranks. Read only."""
    folder = tmp_path_factory.mktemp("adapters")
    settings = {
        "alpha": TrainSettings(r=8, lora_dropout=0.0, lr=3e-3, max_steps=60, batch_size=6),
        "beta": TrainSettings(r=4, lora_dropout=0.0, lr=3e-3, max_steps=60, batch_size=6),
    }
    for name, chosen in settings.items():
        report = qpack.train(packed, write_chats(folder / f"{name}.jsonl", name), folder / name, chosen)
        assert report.final_loss < 0.1
    return {name: folder / name for name in settings}


@pytest.fixture(scope="session")
def server(
    packed: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """The base and both adapters: two slots, room for three versions in memory, a registry, a watched directory.

    Verbose, so that it lists its routes.
    """
    folder = tmp_path_factory.mktemp("server")
    (folder / "watched").mkdir()
    options = ("--registry", str(folder / "registry"), "--adapters", str(folder / "watched"), "--verbose")
    room = ("--max-loras", "2", "--max-cpu-loras", "3")
    process = ServerProcess(folder, packed, adapters, *options, *room)
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
