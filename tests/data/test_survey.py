"""``qpack data``: what it counts is what training sees, and what it prints."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import write_tokenizer

import qpack
from qpack.cli.data import data as command
from qpack.data import DataOptions

ROWS = [
    {"prompt": "hi", "completion": "there"},
    {"prompt": "hi", "completion": ""},
    {"prompt": "hi", "completion": "there", "id": 3},
    {"x": 1},
    {"text": "0123456789" * 12},
    {"prompt": "long", "completion": "x" * 100},
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base of which only the tokenizer is there: nothing else is read."""
    write_tokenizer(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_everything_is_counted(base: Path, data: Path) -> None:
    found = qpack.survey(base, data, DataOptions(on_bad_row="skip"), max_length=64)
    chat = len("<user\nhi>\n<assistant\n")  # a token a byte, and one each for < and >
    assert found.rows == {"prompt-completion": 4, "text": 1}
    assert [line.partition(": ")[0] for line in found.skipped] == [f"{data}:4"]
    assert found.left_out == {"id": 1}
    # Three chats, a text of 121 tokens in two windows that share one, and the long answer.
    lengths = [chat + 6, chat + 1, chat + 6, 64, 58, 64]
    assert (found.sequences, found.tokens) == (6, sum(lengths))
    assert found.learned == 6 + 1 + 6 + 63 + 57 + (64 - chat - 2)
    assert (found.truncated, found.windows, found.longest) == (1, 2, 64)
    assert found.histogram == {32: 3, 64: 3}
    assert found.packed == (5, sum(lengths) / (5 * 64))
    assert (found.duplicates, found.empty) == (1, 1)
    assert found.shown[0].runs == [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
        ("there<|im_end|>", True),
    ]


def test_what_is_learned_stands_between_marks(base: Path, data: Path) -> None:
    arguments = [str(base), str(data), "--on-bad-row", "skip", "--max-length", "64"]
    done = CliRunner().invoke(command, [*arguments, "--examples", "1"])
    assert done.exit_code == 0
    first, *_ = done.stdout.split("\n\n")
    assert first == f"{data}:1\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦there<|im_end|>⟧"
    labels = [line.split()[0] for line in done.stdout.split("\n\n")[1].splitlines()[1:]]
    counted = ["rows", "sequences", "tokens", "lengths", "truncated", "windows", "packed", "duplicates", "empty"]
    assert labels == [*counted, "left", "skipped", "digest", "<=", "<="]

    quiet = CliRunner().invoke(command, [*arguments, "--quiet"])
    assert quiet.stdout.startswith(f"{base}\n")
    asked = json.loads(CliRunner().invoke(command, [*arguments, "--json"]).stdout)
    assert asked == json.loads(
        json.dumps(qpack.survey(base, data, DataOptions(on_bad_row="skip"), max_length=64).as_json())
    )


def test_bad_row_ends_it_by_line(base: Path, data: Path) -> None:
    done = CliRunner().invoke(command, [str(base), str(data)])
    assert done.exit_code == 1
    assert str(done.exception).startswith(f"{data}:4: expected the fields")


def test_preferences(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    found = qpack.survey(base, path, preferences=True)
    assert (found.sequences, found.packed, found.learned) == (2, None, 4)
