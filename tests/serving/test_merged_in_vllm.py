"""A merged checkpoint is like any other: plain vLLM loads it, without bitsandbytes, and answers as the adapter did."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from served import MAX_TOKENS, Question
from taught import PROMPTS

import qpack


def in_plain_vllm(model: str, prompts: tuple[str, ...]) -> list[list[int]]:
    """The greedy tokens of vLLM without plugins, where there is no bitsandbytes. Runs in a process of its own."""
    import os
    import sys

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ["VLLM_PLUGINS"] = ""
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # how Python says that there is none
    from vllm import LLM, SamplingParams

    engine = LLM(model, enforce_eager=True, max_model_len=128, seed=0)
    greedy = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
    chats: list[Any] = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers = engine.chat(chats, greedy, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


@pytest.mark.vllm
def test_plain_vllm_answers_as_the_base_with_its_adapter(
    packed: Path, adapters: dict[str, Path], expected: dict[Question, list[int]], tmp_path: Path
) -> None:
    qpack.merge(packed, adapters["alpha"], tmp_path / "merged")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        answers = pool.submit(in_plain_vllm, str(tmp_path / "merged"), PROMPTS).result()
    assert answers == [expected["alpha", prompt] for prompt in PROMPTS]
