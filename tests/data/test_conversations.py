"""Data files: the two shapes of a line, and a FILE:LINE for every refusal."""

from pathlib import Path

import pytest

from qpack.data.conversations import Conversation, read_conversations
from qpack.errors import DataError

GOOD = '{"prompt": "a", "completion": "b"}'


def test_both_shapes_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    messages = (
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "ü"},'
        ' {"role": "assistant", "content": ""}]}'
    )
    path.write_text(f"{GOOD}\n\n{messages}\n")
    assert read_conversations(path) == [
        Conversation(f"{path}:1", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        Conversation(
            f"{path}:3",
            [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "ü"},
                {"role": "assistant", "content": ""},
            ],
        ),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'prompt'", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b'{"prompt": "\xff"}', "not UTF-8: invalid start byte at byte 12"),
        (b'["prompt"]', "expected an object, found a list"),
        (b"1", "expected an object, found a number"),
        (b"{}", "expected the key 'messages', or 'prompt' and 'completion', found none"),
        (b'{"prompt": "a"}', "expected the key 'messages', or 'prompt' and 'completion', found prompt"),
        (
            b'{"messages": [], "tools": []}',
            "expected the key 'messages', or 'prompt' and 'completion', found messages, tools",
        ),
        (b'{"prompt": ["a"], "completion": "b"}', "prompt: expected a string, found a list"),
        (b'{"prompt": "a", "completion": null}', "completion: expected a string, found null"),
        (b'{"messages": "a"}', "messages: expected a list of messages, found a string"),
        (b'{"messages": []}', "messages: expected a list of messages, found an empty list"),
        (b'{"messages": [true]}', "messages[0]: expected an object, found a boolean"),
        (
            b'{"messages": [{"role": "user", "content": "a", "name": "b"}]}',
            "messages[0]: expected the keys 'role' and 'content', found content, name, role",
        ),
        (
            b'{"messages": [{"role": "bot", "content": "a"}]}',
            "messages[0].role: expected one of system, user, assistant, found 'bot'",
        ),
        (
            b'{"messages": [{"role": "user", "content": {}}]}',
            "messages[0].content: expected a string, found an object",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a"}]}',
            "expected the last message from the assistant, found 'user'",
        ),
    ],
)
def test_bad_line_is_refused(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as error:
        read_conversations(path)
    assert str(error.value) == f"{path}:2: {message}"


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=r"data\.jsonl: no conversation in the file"):
        read_conversations(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: No such file or directory"):
        read_conversations(tmp_path / "nowhere.jsonl")
