"""Greedy answers to orders: from ``qpack serve`` over HTTP, and from a checkpoint in stock transformers."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpack.demo.skills import Order
from qpack.errors import ServeError
from qpack.quiet import quiet_libraries

MAX_TOKENS = 40
"""The longest right answer has 27."""

_READY = re.compile(r"ready at (\S+)")


@contextmanager
def serving(base: Path, adapters: Mapping[str, Path], log: Path) -> Iterator[str]:
    """Run ``qpack serve`` on a free port while the block lasts; yields the URL of its API.

    Raises:
        ServeError: if the server ends before it is ready; what it said is in ``log``.
    """
    command = [sys.executable, "-m", "qpack", "serve", str(base), "--port", "0"]
    for name, path in adapters.items():
        command += ["--adapter", f"{name}={path}"]
    with log.open("w") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            while (ready := _READY.search(log.read_text())) is None:
                if process.poll() is not None:
                    raise ServeError(f"{log}: the server ended with status {process.returncode}")
                time.sleep(0.2)
            yield ready[1]
        finally:
            process.send_signal(signal.SIGTERM)


def ask(url: str, questions: Sequence[tuple[str, Order]]) -> list[str]:
    """The answers of the served models to all questions (model, order), asked at once."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none", timeout=3600, max_retries=0)

    def answer(question: tuple[str, Order]) -> str:
        model, order = question
        completion = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": order.english}],
            temperature=0,
            max_tokens=MAX_TOKENS,
        )
        return completion.choices[0].message.content or ""

    with ThreadPoolExecutor(max_workers=len(questions)) as pool:
        return list(pool.map(answer, questions))


def generate(directory: Path, orders: Sequence[Order]) -> list[str]:
    """The answers of the plain checkpoint in ``directory``, by stock transformers in one batch."""
    with quiet_libraries():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        # Without bf16 instructions a CPU is many times faster in f32, which holds every bf16 weight exactly.
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map=device)
        chats = [[{"role": "user", "content": order.english}] for order in orders]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(device)
        tokens = model.generate(**batch, do_sample=False, max_new_tokens=MAX_TOKENS)
        texts: list[str] = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts
