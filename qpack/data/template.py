"""The chat template: from messages to text, and which of its characters the model learns.

Most templates do not mark the assistant's part (``{% generation %}``), so it is found from outside, the same way for
every template. For each assistant turn the template is rendered twice::

    prompt   the messages before the turn, with the generation prompt: what a server feeds the model
    turn     the messages through the turn                             what the model should have made of it

What ``turn`` adds to ``prompt`` is learned. A turn ends with the first token that stops generation; where the template
writes none, the tokenizer's EOS is appended. As long as the next prompt continues the text so far, the turns share one
sequence. Where it doesn't (Qwen3 drops the reasoning of earlier turns, or an EOS had to be appended), the turn becomes
a sequence of its own, and so every turn is still learned in exactly the context it has when served.

Some generation prompts open a thought (``<think>``) that the data does not hold. There the turn is learned from where
the two part, and :attr:`Rendered.opening` says what was not met. A template that does mark its parts is obeyed: within
the turn only what is marked is learned, and the end token. tests/data/test_templates.py compares with the training
templates that TRL keeps for the families that do not mark theirs.

A template may also drop what it does not know (tools, reasoning, a system message) without a word. That is refused.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpack.data.rows import Conversation, Message, Tools
from qpack.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""As transformers looks for it."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A sequence as text, and the ranges of its characters that are learned.

    ``opening`` is what the generation prompt holds and the turn does not, usually nothing.
    """

    text: str
    learned: list[Span]
    opening: str = ""


class Template:
    """A tokenizer's chat template, or one from a file.

    Raises:
        DataError: there is none, or the file cannot be read.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", base: Path, file: Path | str | None) -> None:
        self._tokenizer = tokenizer
        if file is not None:
            try:
                self._text: str | None = Path(file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{file}: no chat template: {error}") from None
        elif tokenizer.chat_template:
            self._text = None  # the tokenizer chooses, with or without tools
        else:
            raise DataError(
                f"{base}: the tokenizer has no chat template; put the model's own chat_template.jinja there, or name "
                "one with --chat-template"
            )
        self._stops = _stop_tokens(tokenizer, base)

    @property
    def text(self) -> str:
        """The Jinja text for conversations without tools."""
        return self._text or str(self._tokenizer.get_chat_template())

    def render(self, conversation: Conversation) -> list[Rendered]:
        """Render the turns to learn, joining turns into one sequence as long as each continues the last.

        Raises:
            DataError: the conversation cannot be learned through this template; says why, without its origin.
        """
        messages, tools = conversation.messages, conversation.tools
        sequences: list[Rendered] = []
        for index in conversation.learned:
            self._require_no_stop(messages[index], index)
            prompt, _ = self._apply(messages[:index], tools, prompting=True)
            turn, marked = self._apply(messages[: index + 1], tools, prompting=False)
            start = self._start(messages[:index], tools, prompt, turn, index)
            stop = self._stops.search(turn, start)
            end = stop.start() if stop else len(turn)
            text = turn[: stop.end()] if stop else turn + str(self._tokenizer.eos_token)
            self._require_all(messages[: index + 1], tools, text, text[start:end])
            if marked is None:
                learned = [(start, len(text))]
            else:
                learned = [(max(a, start), min(b, end)) for a, b in marked if a < end and b > start]
                learned.append((end, len(text)))
            opening = prompt[start:]
            if sequences and prompt.startswith(sequences[-1].text):
                last = sequences[-1]
                sequences[-1] = Rendered(text, last.learned + learned, last.opening or opening)
            else:
                sequences.append(Rendered(text, learned, opening))
        return sequences

    def _start(self, before: Sequence[Message], tools: Tools | None, prompt: str, turn: str, index: int) -> int:
        """Where the turn begins to be the model's: after the prompt, or where the two part within its last words."""
        if turn.startswith(prompt):
            return len(prompt)
        shared = next(i for i, pair in enumerate(zip(prompt, turn, strict=False)) if pair[0] != pair[1])
        history, _ = self._apply(before, tools, prompting=False)
        if not prompt.startswith(history) or shared < len(history):
            raise DataError(
                f"messages[{index}]: the chat template does not render the assistant's turn as a continuation of its "
                "generation prompt"
            )
        return shared

    def _apply(
        self, messages: Sequence[Message], tools: Tools | None, *, prompting: bool
    ) -> tuple[str, list[Span] | None]:
        """Render; also the spans that the template marks, or None if it marks none."""
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # its annotations fall short of what it takes and gives
        template = self._text or self._tokenizer.get_chat_template(tools=tools)
        marks = not prompting and _MARK.search(template) is not None
        try:
            (text,), spans = render(
                conversations=[list(messages)],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompting,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # whatever the template's own expressions raise
            raise DataError(f"the chat template refuses the conversation: {error}") from None
        return text, spans[0] if marks else None

    def _require_no_stop(self, message: Message, index: int) -> None:
        if inner := self._stops.search(message["content"] or ""):
            raise DataError(f"messages[{index}]: holds the end token {inner.group()!r} itself")

    @staticmethod
    def _require_all(messages: Sequence[Message], tools: Tools | None, text: str, turn: str) -> None:
        """Refuse a text in which something of the conversation is missing."""
        whole, said = _squeezed(text), _squeezed(turn)
        for tool in tools or []:
            if not _holds(whole, str(tool.get("function", tool).get("name", ""))):
                raise DataError("tools: the chat template leaves them out")
        for index, message in enumerate(messages):
            last = index == len(messages) - 1
            if message["role"] == "assistant" and not last:
                continue  # templates rightly drop what was thought in earlier turns
            parts = {key: message[key] for key in ("content", "reasoning_content", "thinking") if message.get(key)}
            for number, call in enumerate(message.get("tool_calls", [])):
                parts[f"tool_calls[{number}]"] = call["function"]["name"]
            for key, part in parts.items():
                if not _holds(said if last else whole, part):
                    raise DataError(f"messages[{index}].{key}: the chat template leaves it out, or part of it")


def _squeezed(text: str) -> str:
    """The text without white space, which templates trim."""
    return "".join(text.split())


def _holds(text: str, part: str) -> bool:
    """Whether the squeezed text holds the part, as it is or as JSON spells it."""
    return _squeezed(part) in text or _squeezed(json.dumps(part, ensure_ascii=False)[1:-1]) in text


def _stop_tokens(tokenizer: "PreTrainedTokenizerBase", base: Path) -> re.Pattern[str]:
    """Match any token at which a server stops: the EOS and those of generation_config.json."""
    ids = {tokenizer.eos_token_id}
    try:
        settings: dict[str, Any] = json.loads((base / "generation_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        settings = {}
    except ValueError as error:
        raise DataError(f"{base / 'generation_config.json'}: not JSON: {error}") from None
    declared = settings.get("eos_token_id")
    ids.update(declared if isinstance(declared, list) else [] if declared is None else [declared])
    tokens = [tokenizer.convert_ids_to_tokens(index) for index in sorted(ids) if index < len(tokenizer)]
    return re.compile("|".join(re.escape(str(token)) for token in tokens))
