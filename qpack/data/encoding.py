"""From conversations to token ids and labels: the loss falls on what the assistant says, its end token included.

Most chat templates do not mark the assistant's part (``{% generation %}``), so it is found from outside, the same way
for every template. For each assistant turn the template is rendered twice::

    prompt   the messages before the turn, with the generation prompt: what a server feeds the model
    turn     the messages through the turn                             what the model should have made of it

``prompt`` must be a prefix of ``turn``, else the model would learn to continue a text it never meets; the rest is what
is learned. A turn ends with the first token that stops generation; where the template writes none, the tokenizer's EOS
is appended. As long as the next prompt continues the text so far, the turns share one sequence. Where it doesn't (Qwen3
drops the reasoning of earlier turns, or an EOS had to be appended), the turn becomes a sequence of its own, and so
every turn is still learned in exactly the context it has when served.

No special tokens are added to a rendered template: it holds its own, and a server adds none either. So there is no
second BOS. Refused: a tokenizer without chat template, EOS or offsets, a template that rejects a conversation, an
answer that holds an end token itself, and a conversation of which ``max_length`` would leave nothing to learn.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qpack.data.conversations import Conversation, Message
from qpack.errors import DataError

IGNORED = -100
"""The label that the loss of transformers and torch skips."""

Render = Callable[[Sequence[Message], bool], str]
"""Messages and whether to add the generation prompt, to text."""


class Example(TypedDict):
    """One sequence: its tokens, and for each token itself if it is learned, else :data:`IGNORED`."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """All sequences of a file, and how many of them were cut at ``max_length``."""

    examples: list[Example]
    truncated: int


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A rendered sequence and the ranges of its characters that are learned."""

    text: str
    learned: list[tuple[int, int]]


def encode(
    conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase, base: Path, *, max_length: int
) -> Encoded:
    """Render, tokenize and label every conversation with the template of the tokenizer in ``base``.

    Raises:
        DataError: the tokenizer cannot be used, or a conversation cannot; the message names its ``FILE:LINE``.
    """
    if not tokenizer.chat_template:
        raise DataError(f"{base}: the tokenizer has no chat template; put the model's own chat_template.jinja there")
    if not tokenizer.is_fast:
        raise DataError(f"{base}: the tokenizer gives no character offsets; add its tokenizer.json")
    if tokenizer.eos_token is None:
        raise DataError(f"{base}: the tokenizer has no eos_token, so the model could not learn to stop")
    stops = _stop_tokens(tokenizer, base)

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    examples: list[Example] = []
    truncated = 0
    for conversation in conversations:
        for rendered in _render(conversation, render, stops, str(tokenizer.eos_token)):
            example = _label(rendered, tokenizer)
            length = len(example["input_ids"])
            if length > max_length:
                truncated += 1
                example = Example(input_ids=example["input_ids"][:max_length], labels=example["labels"][:max_length])
            if all(label == IGNORED for label in example["labels"]):
                raise DataError(
                    f"{conversation.origin}: nothing left to learn: max_length {max_length} cuts the {length} tokens "
                    "before the assistant speaks"
                )
            examples.append(example)
    return Encoded(examples, truncated)


def _stop_tokens(tokenizer: PreTrainedTokenizerBase, base: Path) -> re.Pattern[str]:
    """Match any token at which a server stops: the EOS and those of generation_config.json."""
    ids = {tokenizer.eos_token_id}
    if (base / "generation_config.json").is_file():
        declared = GenerationConfig.from_pretrained(base).eos_token_id
        ids.update(declared if isinstance(declared, list) else [declared] if declared is not None else [])
    return re.compile("|".join(re.escape(str(tokenizer.convert_ids_to_tokens(index))) for index in sorted(ids)))


def _render(conversation: Conversation, render: Render, stops: re.Pattern[str], eos: str) -> list[_Rendered]:
    """Render every assistant turn, joining turns into one sequence as long as each continues the last."""
    sequences: list[_Rendered] = []
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        if inner := stops.search(message["content"]):
            raise DataError(f"{conversation.origin}: messages[{index}]: holds the end token {inner.group()!r} itself")
        try:
            prompt = render(conversation.messages[:index], True)
            turn = render(conversation.messages[: index + 1], False)
        except TemplateError as error:
            raise DataError(f"{conversation.origin}: the chat template refuses the conversation: {error}") from None
        if not turn.startswith(prompt):
            raise DataError(
                f"{conversation.origin}: messages[{index}]: the chat template does not render the assistant's turn "
                "as a continuation of its generation prompt"
            )
        end = stops.search(turn, len(prompt))
        text = turn[: end.end()] if end else turn + eos
        span = (len(prompt), len(text))
        if sequences and prompt.startswith(sequences[-1].text):
            sequences[-1] = _Rendered(text, [*sequences[-1].learned, span])
        else:
            sequences.append(_Rendered(text, [span]))
    return sequences


def _label(rendered: _Rendered, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokenize a sequence; a token is learned if it begins inside a learned range."""
    encoding = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids: list[int] = encoding["input_ids"]
    labels = [
        token if any(start <= begin < end for start, end in rendered.learned) else IGNORED
        for token, (begin, _) in zip(input_ids, encoding["offset_mapping"], strict=True)
    ]
    return Example(input_ids=input_ids, labels=labels)
