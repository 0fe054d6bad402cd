"""The formats of a row, told apart by their fields; the first whose fields are all there is taken.

=================  ==========================================  ==================================================
format             fields                                      what becomes of it
=================  ==========================================  ==================================================
messages           messages, and tools                         the conversation as it stands
sharegpt           conversations, and system, tools            ``from``/``value`` are read as role and content
prompt-completion  prompt, completion, and tools               a user's message and the answer; or lists of messages
alpaca             instruction, output, and input, system,     instruction, empty line, input as the user's message;
                   history                                     output as the answer
text               text                                        plain text, learned whole
preference         chosen, rejected, and prompt, tools         two conversations, or two answers to the prompt
=================  ==========================================  ==================================================

Shared by all: a field that is null is a field that is absent. A list that stands as JSON text, as in a CSV file, is
read. Lists of messages may be spelt either way, ``role``/``content`` or ``from``/``value``. A conversation ends with
the assistant's message, since what follows it would never be learned. ``"weight": 0`` on an assistant's message
leaves that message unlearned, as does its place in a prompt.

Fields of a row that no format takes (ids, sources, scores) are left out, and counted in the report. Inside a message
nothing is: an unknown key there is refused, since it would change what the model is told.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpack.data.rows import Comparison, Conversation, Document, Message, Tools
from qpack.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
"""ShareGPT's names of roles, where they differ; the last two are LLaMA-Factory's."""

_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "weight")

Record = Mapping[str, Any]
AnyRow = Conversation | Document | Comparison


@dataclass(frozen=True, slots=True)
class Format:
    """A way to write a row: the fields it must and may have, and how it is read."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Record, str], AnyRow]
    preference: bool = False

    @property
    def fields(self) -> str:
        """The fields that must be there, as a message names them."""
        return " and ".join(map(repr, self.required))


def recognise(record: Record, formats: Sequence[Format]) -> Format:
    """Return the format of a record without null fields.

    Raises:
        DataError: it is none of ``formats``; says what was found and what was expected.
    """
    for form in formats:
        if all(name in record for name in form.required):
            return form
    expected = ", or ".join(f"{form.fields} ({form.name})" for form in formats)
    found = ", ".join(sorted(map(repr, record))) or "none"
    raise DataError(f"expected the fields {expected}; found {found}")


def _from_messages(record: Record, origin: str) -> Conversation:
    return _conversation(origin, _messages(record["messages"], "messages"), _tools(record))


def _from_sharegpt(record: Record, origin: str) -> Conversation:
    turns = _messages(record["conversations"], "conversations")
    if system := _text(record.get("system", ""), "system"):
        turns = [({"role": "system", "content": system}, False), *turns]
    return _conversation(origin, turns, _tools(record))


def _from_prompt_completion(record: Record, origin: str) -> Conversation:
    prompt = _turns(record["prompt"], "prompt", "user")
    completion = _turns(record["completion"], "completion", "assistant")
    return _conversation(origin, [*_unlearned(prompt), *completion], _tools(record))


def _from_alpaca(record: Record, origin: str) -> Conversation:
    turns: list[tuple[Message, bool]] = []
    if system := _text(record.get("system", ""), "system"):
        turns.append(({"role": "system", "content": system}, False))
    for index, pair in enumerate(_list(record.get("history", []), "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"history[{index}]: expected a question and its answer, found {_kind(pair)}")
        turns += _turns(pair[0], f"history[{index}][0]", "user") + _turns(pair[1], f"history[{index}][1]", "assistant")
    instruction, given = _text(record["instruction"], "instruction"), _text(record.get("input", ""), "input")
    turns.append(({"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction}, False))
    return _conversation(origin, turns + _turns(record["output"], "output", "assistant"), None)


def _from_text(record: Record, origin: str) -> Document:
    text = _text(record["text"], "text")
    if not text:
        raise DataError("text: empty")
    return Document(origin, text)


def _from_preference(record: Record, origin: str) -> Comparison:
    prompt = [message for message, _ in _turns(record["prompt"], "prompt", "user")] if "prompt" in record else []
    chosen, rejected = (
        [message for message, _ in _turns(record[name], name, "assistant")] for name in ("chosen", "rejected")
    )
    if chosen[0]["role"] in ("system", "developer", "user"):  # whole conversations: what they share is the prompt
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        if prompt and prompt[-1] not in chosen[:shared]:
            raise DataError("prompt: chosen and rejected are whole conversations, and do not begin with it")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise DataError("chosen and rejected are whole conversations, and do not begin with the same message")
    if not prompt:
        raise DataError("expected the field 'prompt', or whole conversations in chosen and rejected")
    _require_answer(chosen, "chosen")
    _require_answer(rejected, "rejected")
    if chosen == rejected:
        raise DataError("chosen and rejected are the same")
    return Comparison(origin, prompt, chosen, rejected, _tools(record))


_ALL = (
    Format("messages", ("messages",), ("tools",), _from_messages),
    Format("sharegpt", ("conversations",), ("system", "tools"), _from_sharegpt),
    Format("prompt-completion", ("prompt", "completion"), ("tools",), _from_prompt_completion),
    Format("alpaca", ("instruction", "output"), ("input", "system", "history"), _from_alpaca),
    Format("preference", ("chosen", "rejected"), ("prompt", "tools"), _from_preference, preference=True),
    Format("text", ("text",), (), _from_text),
)


def formats(*, preferences: bool, only: str | None = None) -> list[Format]:
    """Return those that hold preferences or those that do not, in the order in which they are tried.

    Raises:
        DataError: the format asked for is of the other kind.
    """
    fitting = [form for form in _ALL if form.preference == preferences]
    chosen = [form for form in fitting if only in (None, form.name)]
    if not chosen:
        kind = "preferences" if preferences else "examples"
        raise DataError(f"format: {only!r} holds no {kind}, expected {' or '.join(form.name for form in fitting)}")
    return chosen


def _conversation(origin: str, turns: Sequence[tuple[Message, bool]], tools: Tools | None) -> Conversation:
    _require_answer([message for message, _ in turns], "messages")
    learned = [index for index, (_, learn) in enumerate(turns) if learn]
    if not learned:
        raise DataError("no message to learn: every assistant's message has weight 0 or stands in the prompt")
    return Conversation(origin, [message for message, _ in turns], learned, tools)


def _require_answer(messages: Sequence[Message], name: str) -> None:
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{name}: expected the last message from the assistant, found {messages[-1]['role']!r}")


def _unlearned(turns: Sequence[tuple[Message, bool]]) -> list[tuple[Message, bool]]:
    return [(message, False) for message, _ in turns]


def _turns(value: object, name: str, role: str) -> list[tuple[Message, bool]]:
    """Messages, or a string that stands for one of ``role``."""
    if isinstance(value, str):
        return [({"role": role, "content": value}, role == "assistant")]
    if not isinstance(value, list):
        raise DataError(f"{name}: expected a string or a list of messages, found {_kind(value)}")
    return _messages(value, name)


def _messages(value: object, name: str) -> list[tuple[Message, bool]]:
    """Every message with whether it is learned."""
    messages = _list(value, name)
    if not messages:
        raise DataError(f"{name}: expected messages, found an empty list")
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(messages)]


def _message(value: object, name: str) -> tuple[Message, bool]:
    if not isinstance(value, dict):
        raise DataError(f"{name}: expected an object, found {_kind(value)}")
    given = {key: part for key, part in value.items() if part is not None}
    if "from" in given and "role" not in given:
        given = _from_value(given, name)
    for key in given:
        if key not in _MESSAGE_KEYS:
            raise DataError(f"{name}: unknown key {key!r}, expected one of {', '.join(_MESSAGE_KEYS)}")
    role = _text(given.get("role"), f"{name}.role")
    if role not in ROLES:
        raise DataError(f"{name}.role: expected one of {', '.join(ROLES)}, found {role!r}")
    speaks = role == "assistant"
    for key in ("tool_calls", "reasoning_content", "thinking", "weight"):
        if key in given and not speaks:
            raise DataError(f"{name}.{key}: only an assistant's message can have it, found role {role!r}")
    weight = given.pop("weight", 1)
    if weight not in (0, 1):
        raise DataError(f"{name}.weight: expected 0 or 1, found {weight!r}")
    message: Message = given | {"content": _content(given.get("content"), name, called="tool_calls" in given)}
    if "tool_calls" in given:
        calls = _list(given["tool_calls"], f"{name}.tool_calls")
        message["tool_calls"] = [_call(call, f"{name}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return message, speaks and weight == 1


def _from_value(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Read a ShareGPT message."""
    role = _text(given["from"], f"{name}.from")
    rest = {key: part for key, part in given.items() if key not in ("from", "value")}
    if role == "function_call":
        called = _json(_text(given.get("value"), f"{name}.value"), f"{name}.value")
        return {"role": "assistant", "tool_calls": called if isinstance(called, list) else [called], **rest}
    return {"role": _SHAREGPT_ROLES.get(role, role), "content": given.get("value"), **rest}


def _content(value: object, name: str, *, called: bool) -> str | None:
    """A message's text; parts, as of messages with images, are joined if all are text."""
    if value is None and called:
        return None
    if not isinstance(value, list):
        return _text(value, f"{name}.content")
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else _kind(part)
        if not isinstance(part, dict) or kind != "text":
            raise DataError(f"{name}.content[{index}]: expected a part of type 'text', found {kind!r}")
        texts.append(_text(part.get("text"), f"{name}.content[{index}].text"))
    return "".join(texts)


def _call(value: object, name: str) -> dict[str, Any]:
    """A tool call as templates take it: its arguments an object, not JSON text."""
    if not isinstance(value, dict):
        raise DataError(f"{name}: expected an object, found {_kind(value)}")
    function = value.get("function", value)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{name}: expected a function with its name and arguments")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{name}.arguments")
    if not isinstance(arguments, dict):
        raise DataError(f"{name}.arguments: expected an object, found {_kind(arguments)}")
    outer = {key: part for key, part in value.items() if key in ("id", "type") and part is not None}
    return {"type": "function", **outer, "function": {"name": function["name"], "arguments": arguments}}


def _tools(record: Record) -> Tools | None:
    tools = _list(record.get("tools", []), "tools")
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise DataError(f"tools[{index}]: expected an object, found {_kind(tool)}")
    return tools or None


def _list(value: object, name: str) -> list[Any]:
    if isinstance(value, str):
        value = _json(value, name) if value.strip() else []
    if not isinstance(value, list):
        raise DataError(f"{name}: expected a list, found {_kind(value)}")
    return value


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}: expected JSON, found text that is none: {error.msg}") from None


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name}: expected a string, found {_kind(value)}")
    return value


def _kind(value: object) -> str:
    """Name a JSON value the way JSON does."""
    if value == []:
        return "an empty list"
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
