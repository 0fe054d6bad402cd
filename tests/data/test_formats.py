"""Rows of every format, recognised by their fields, and a FILE:LINE for every refusal."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from qpack.data import BadRow, Conversation, DataOptions, Document, read, read_preferences
from qpack.errors import DataError

GOOD = '{"prompt": "a", "completion": "b"}'

ASK = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
OTHER = {"role": "assistant", "content": "c"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {}}}


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("record", "messages", "learned"),
    [
        ({"messages": [ASK, ANSWER]}, [ASK, ANSWER], [1]),
        ({"messages": [ASK, ANSWER], "prompt": "left out", "score": None}, [ASK, ANSWER], [1]),
        ({"messages": [ASK, ANSWER | {"weight": 0}, ASK, OTHER]}, [ASK, ANSWER, ASK, OTHER], [3]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}, ANSWER]},
            [ASK, ANSWER],
            [1],
        ),
        (
            {"messages": [ASK, {"role": "assistant", "tool_calls": [{"name": "add", "arguments": '{"x": 1}'}]}]},
            [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
            [1],
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
            [{"role": "system", "content": "s"}, ASK, ANSWER],
            [2],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "b"},
                ]
            },
            [
                ASK,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "2"},
                ANSWER,
            ],
            [1, 3],
        ),
        ({"prompt": "a", "completion": "b"}, [ASK, ANSWER], [1]),
        ({"prompt": [ASK, ANSWER, ASK], "completion": [OTHER]}, [ASK, ANSWER, ASK, OTHER], [3]),
        ({"instruction": "a", "input": "", "output": "b"}, [ASK, ANSWER], [1]),
        (
            {"instruction": "a", "input": "x", "output": "b", "text": "the same again"},
            [{"role": "user", "content": "a\n\nx"}, ANSWER],
            [1],
        ),
        (
            {"instruction": "a", "output": "b", "system": "s", "history": [["a", "c"]]},
            [{"role": "system", "content": "s"}, ASK, OTHER, ASK, ANSWER],
            [2, 4],
        ),
    ],
)
def test_conversations(tmp_path: Path, record: object, messages: list[Any], learned: list[int]) -> None:
    path = write(tmp_path / "data.jsonl", record)
    assert read(path).rows == [Conversation(f"{path}:1", messages, learned)]


def test_rows_of_several_formats_and_what_is_left_out(tmp_path: Path) -> None:
    tooled = {"messages": [ASK, ANSWER], "tools": json.dumps([ADD])}
    path = write(tmp_path / "data.jsonl", {"text": "a", "id": 1}, tooled, {"text": "b", "id": 2, "url": None})
    rows = read(path)
    assert rows.rows == [
        Document(f"{path}:1", "a"),
        Conversation(f"{path}:2", [ASK, ANSWER], [1], [ADD]),
        Document(f"{path}:3", "b"),
    ]
    assert rows.formats == {"text": 2, "messages": 1}
    assert rows.left_out == {"id": 2}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1.0},
        {"prompt": [ASK], "chosen": [ANSWER], "rejected": [OTHER]},
        {"chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
        {"prompt": "a", "chosen": [ASK, ANSWER], "rejected": [ASK, OTHER], "messages": [ASK, ANSWER]},
    ],
)
def test_preferences(tmp_path: Path, record: object) -> None:
    (row,) = read_preferences(write(tmp_path / "data.jsonl", record)).rows
    assert (row.prompt, row.chosen, row.rejected) == ([ASK], [ANSWER], [OTHER])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"chosen": "b", "rejected": "c"},
            "expected the field 'prompt', or whole conversations in chosen and rejected",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": [ANSWER, ASK], "rejected": "b"}, "chosen: expected the last message from the "),
        (
            {"prompt": "x", "chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
            "prompt: chosen and rejected are whole conversations, and do not begin with it",
        ),
        (
            {"chosen": [ASK, ANSWER], "rejected": [ASK | {"content": "x"}, OTHER]},
            "chosen and rejected are whole conversations, and do not begin with the same message",
        ),
        (
            {"messages": [ASK, ANSWER]},
            "expected the fields 'chosen' and 'rejected' (preference); found 'messages'",
        ),
    ],
)
def test_bad_preference_is_refused(tmp_path: Path, record: object, message: str) -> None:
    path = write(tmp_path / "data.jsonl", record)
    with pytest.raises(DataError) as error:
        read_preferences(path)
    assert str(error.value).startswith(f"{path}:1: {message}")


EXPECTED = (
    "expected the fields 'messages' (messages), or 'conversations' (sharegpt), or 'prompt' and 'completion' "
    "(prompt-completion), or 'instruction' and 'output' (alpaca), or 'text' (text); found "
)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'prompt'", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b'{"prompt": "\xff"}', "not UTF-8: invalid start byte at byte 12"),
        (b'["prompt"]', "expected an object, found a list"),
        (b"1", "expected an object, found a plain value"),
        (b"{}", EXPECTED + "none"),
        (b'{"prompt": "a", "b": 1}', EXPECTED + "'b', 'prompt'"),
        (b'{"chosen": "a", "rejected": "b"}', EXPECTED + "'chosen', 'rejected'"),
        (b'{"text": ""}', "text: empty"),
        (b'{"prompt": 1, "completion": "b"}', "prompt: expected a string or a list of messages, found a number"),
        (b'{"prompt": "a", "completion": []}', "completion: expected messages, found an empty list"),
        (b'{"messages": "a"}', "messages: expected JSON, found text that is none: Expecting value"),
        (b'{"messages": []}', "messages: expected messages, found an empty list"),
        (b'{"messages": [true]}', "messages[0]: expected an object, found a boolean"),
        (
            b'{"messages": [{"role": "user", "content": "a", "mood": "b"}]}',
            "messages[0]: unknown key 'mood', expected one of role, content, name, tool_calls, tool_call_id, "
            "reasoning_content, thinking, weight",
        ),
        (
            b'{"messages": [{"role": "bot", "content": "a"}]}',
            "messages[0].role: expected one of system, developer, user, assistant, tool, found 'bot'",
        ),
        (
            b'{"messages": [{"role": "user", "content": {}}]}',
            "messages[0].content: expected a string, found an object",
        ),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "messages[0].content[0]: expected a part of type 'text', found 'image'",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a", "weight": 1}]}',
            "messages[0].weight: only an assistant's message can have it, found role 'user'",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}',
            "messages[0].weight: expected 0 or 1, found 0.5",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}',
            "no message to learn: every assistant's message has weight 0 or stands in the prompt",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a"}]}',
            "messages: expected the last message from the assistant, found 'user'",
        ),
        (
            b'{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[]"}]}]}',
            "messages[0].tool_calls[0].arguments: expected an object, found an empty list",
        ),
        (b'{"messages": [{"role": "assistant", "tool_calls": [1]}]}', "messages[0].tool_calls[0]: expected an object,"),
        (b'{"instruction": "a", "output": "b", "history": ["c"]}', "history[0]: expected a question and its answer"),
        (b'{"messages": [{"role": "assistant", "content": "a"}], "tools": [1]}', "tools[0]: expected an object"),
    ],
)
def test_bad_row_is_refused_or_skipped(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\n" + line + b"\n")
    with pytest.raises(BadRow) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:3: {message}")
    rows = read(path, DataOptions(on_bad_row="skip"))
    assert len(rows.rows) == 1
    assert [str(bad) for bad in rows.skipped] == [str(error.value)]
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_format_that_is_asked_for_is_required_of_every_row(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"text": "a", "messages": [ASK, ANSWER]}, {"messages": [ASK, ANSWER]})
    with pytest.raises(DataError, match=r"data\.jsonl:2: expected the fields 'text' \(text\); found 'messages'$"):
        read(path, DataOptions(format="text"))
    with pytest.raises(DataError, match=r"^format: 'preference' holds no examples, expected messages or sharegpt"):
        read(path, DataOptions(format="preference"))


@pytest.mark.parametrize("field", ["format", "loss", "on_bad_row"])
def test_option_that_is_not_offered_is_refused(field: str) -> None:
    with pytest.raises(DataError, match=f"^{field}: expected one of .*, found 'best'$"):
        DataOptions(**{field: "best"})


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=r"data\.jsonl: no row to train on$"):
        read(path)
    path.write_text("{}\n")
    with pytest.raises(
        DataError, match=r"no row to train on; 1 rows were skipped, the first: .*data\.jsonl:1: expected"
    ):
        read(path, DataOptions(on_bad_row="skip"))
