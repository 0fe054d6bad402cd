"""What the model answers to a few prompts of the data, greedily, without the adapter and with it.

Both are asked when training is done: without the adapter the model is the base that it was, and nothing is drawn from
the random numbers of a run that may be interrupted.
"""

from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qpack.data import IGNORED, Example
from qpack.training.report import Sample

MAX_TOKENS = 32
"""Of an answer, so that a few of them take seconds on a CPU."""

_MAX_PROMPT = 512
"""Tokens of a prompt, its last ones; of a text that is learned from its beginning, half of the first ones."""


def draw_samples(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], count: int
) -> tuple[Sample, ...]:
    """Answer ``count`` prompts, spread evenly over ``examples``; the model is left in training mode."""
    count = min(count, len(examples))
    if not count:
        return ()
    parted = [_part(examples[index * len(examples) // count]) for index in range(count)]
    prompts = [prompt for prompt, _ in parted]
    model.eval()
    after = _answers(model, tokenizer, prompts)
    with model.disable_adapter():
        before = _answers(model, tokenizer, prompts)
    model.train()
    return tuple(
        Sample(str(tokenizer.decode(prompt)), str(tokenizer.decode(expected)), was, becomes)
        for (prompt, expected), was, becomes in zip(parted, before, after, strict=True)
    )


def _part(example: Example) -> tuple[list[int], list[int]]:
    """The tokens before the first answer, and the answer."""
    tokens, labels = example["input_ids"], example["labels"]
    begin = next(index for index, label in enumerate(labels) if label != IGNORED)
    if begin < 2:  # all of it is learned
        begin = max(1, min(len(tokens), _MAX_PROMPT) // 2)
    end = next((index for index in range(begin, len(labels)) if labels[index] == IGNORED), len(labels))
    return tokens[max(0, begin - _MAX_PROMPT) : begin], tokens[begin : min(end, begin + MAX_TOKENS)]


@torch.no_grad()
def _answers(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]) -> list[str]:
    longest = max(map(len, prompts))
    device = model.device
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    stops = model.generation_config.eos_token_id
    ends = set(stops if isinstance(stops, list) else [stops]) | {tokenizer.eos_token_id}
    config = GenerationConfig(
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        eos_token_id=sorted(end for end in ends if end is not None),
        pad_token_id=0,
    )
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [str(tokenizer.decode(_until(row[longest:].tolist(), config.eos_token_id))) for row in output]


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Without the padding behind the first of ``ends``."""
    stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: stop + 1]
