"""Training data: a JSONL file of conversations.

Every line is an object of one of two shapes::

    {"messages": [{"role": "system" | "user" | "assistant", "content": TEXT}, ...]}
    {"prompt": TEXT, "completion": TEXT}

The second is short for a user message and the assistant's answer. The last message must be the assistant's, since what
follows it would never be learned. Blank lines are skipped; anything else, unknown keys among it, is refused with
``FILE:LINE``, so that no part of the data is dropped unseen.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpack.errors import DataError

ROLES = ("system", "user", "assistant")

Message = dict[str, str]
"""``{"role": ..., "content": ...}``, the form that chat templates take."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that end with the assistant's; ``origin`` is the ``FILE:LINE`` they come from."""

    origin: str
    messages: list[Message]


def read_conversations(path: Path) -> list[Conversation]:
    """Read and check the whole file.

    Raises:
        DataError: the file cannot be read or holds no conversation, or a line is not one; the message names the line.
    """
    try:
        conversations = [
            Conversation(origin, _messages(_parse(line, origin), origin)) for origin, line in _filled_lines(path)
        ]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if not conversations:
        raise DataError(f"{path}: no conversation in the file")
    return conversations


def _filled_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ``FILE:LINE`` and the bytes of every line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", line


def _parse(line: bytes, origin: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise DataError(f"{origin}: expected an object, found {_kind(record)}")
    return record


def _messages(record: dict[str, Any], origin: str) -> list[Message]:
    """Return the messages of a line of either shape."""
    if record.keys() == {"prompt", "completion"}:
        prompt = _text(record["prompt"], "prompt", origin)
        completion = _text(record["completion"], "completion", origin)
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if record.keys() != {"messages"}:
        found = ", ".join(sorted(record)) or "none"
        raise DataError(f"{origin}: expected the key 'messages', or 'prompt' and 'completion', found {found}")
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{origin}: messages: expected a list of messages, found {_kind(messages)}")
    checked = [_message(message, f"messages[{index}]", origin) for index, message in enumerate(messages)]
    if checked[-1]["role"] != "assistant":
        raise DataError(f"{origin}: expected the last message from the assistant, found {checked[-1]['role']!r}")
    return checked


def _message(message: object, name: str, origin: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{origin}: {name}: expected an object, found {_kind(message)}")
    if message.keys() != {"role", "content"}:
        found = ", ".join(sorted(message)) or "none"
        raise DataError(f"{origin}: {name}: expected the keys 'role' and 'content', found {found}")
    role = _text(message["role"], f"{name}.role", origin)
    if role not in ROLES:
        raise DataError(f"{origin}: {name}.role: expected one of {', '.join(ROLES)}, found {role!r}")
    return {"role": role, "content": _text(message["content"], f"{name}.content", origin)}


def _text(value: object, name: str, origin: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{origin}: {name}: expected a string, found {_kind(value)}")
    return value


def _kind(value: object) -> str:
    """Name a JSON value the way JSON does."""
    if value == []:
        return "an empty list"
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
