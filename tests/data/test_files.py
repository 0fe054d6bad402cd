"""Files of every kind, directories, data sets of a hub, and weights."""

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hub
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from qpack.data import Conversation, DataOptions, Document, read
from qpack.data.sources import find
from qpack.errors import DataError

MESSAGES = [
    [{"role": "user", "content": 'ü, "\n'}, {"role": "assistant", "content": "b"}],
    [
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]},
    ],
]


def texts(path: Path | str) -> list[str]:
    return [row.text for row in read(path).rows if isinstance(row, Document)]


def write_jsonl(path: Path, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"{path.stem} {index}"}) + "\n" for index in range(count)))
    return path


def write_kind(path: Path) -> Path:
    """Write MESSAGES in the format of the suffix."""
    rows = [{"messages": messages} for messages in MESSAGES]
    match path.name:
        case "data.jsonl" | "lines.json":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "list.json":
            path.write_text("\n[\n" + ",\n\n".join(json.dumps(row, indent=1) for row in rows) + "]\n")
        case "data.csv" | "data.tsv":
            with path.open("w", newline="") as file:
                table = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
                table.writerows([["messages"], *([json.dumps(row["messages"], indent=0)] for row in rows)])
        case "data.parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("data.jsonl", [1, 2]),
        ("lines.json", [1, 2]),
        ("list.json", [3, 16]),
        ("data.csv", [2, 12]),
        ("data.tsv", [2, 12]),
        ("data.parquet", [1, 2]),
    ],
)
def test_every_kind_of_table_gives_the_same_rows(tmp_path: Path, name: str, lines: list[int]) -> None:
    path = write_kind(tmp_path / name)
    rows = [row for row in read(path).rows if isinstance(row, Conversation)]
    assert [row.origin for row in rows] == [f"{path}:{line}" for line in lines]
    assert rows[0].messages == MESSAGES[0]
    assert rows[1].messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def test_directory_of_texts(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "sub" / "a.md").write_text("three")
    (tmp_path / "a.txt").write_text("\ufeffone")
    (tmp_path / ".hidden.txt").write_text("never")
    (tmp_path / "picture.png").write_bytes(b"\xff")
    assert texts(tmp_path) == ["one", "two", "three"]


def test_directory_of_data_is_read_without_its_texts(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "train.jsonl", 2)
    (tmp_path / "README.md").write_text("about")
    assert texts(tmp_path) == ["train 0", "train 1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"", r"expected a file of kind \.jsonl, .*, found '\.xlsx'"),
        ("a.txt", b"a\xff", "not UTF-8: invalid start byte at byte 1"),
        ("a.json", b'[\n{"text": "a"}\n{"text": "b"}]', r"a\.json:3: not JSON: expected ',' or ']'"),
        ("a.json", b'[\n{"text": }]', r"a\.json:2: not JSON: Expecting value at column 10"),
        ("a.json", b'[{"text": "a"}', r"a\.json:1: not JSON: expected ',' or ']'"),
        ("a.json", b'[{"text": "a"}] {}', r"a\.json: not JSON: something follows the list"),
        ("a.json", b"[1]", r"a\.json:1: expected an object, found a plain value"),
        ("a.csv", b'text\na\n"b', r"a\.csv:3: not CSV: unexpected end of data"),
        ("a.csv", b"text\na\nb,c\n", r"a\.csv:3: expected 1 cells as in the header, found 2"),
        ("a.parquet", b"PAR1", r"a\.parquet: not a Parquet file: "),
    ],
)
def test_broken_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: No such file or directory"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"^data/nowhere\.jsonl: No such file or directory"):
        read("data/nowhere.jsonl")  # not taken for a data set of the hub
    with pytest.raises(DataError, match="no file of kind"):
        read(tmp_path)


def test_weights_repeat_and_draw_whole_rows(tmp_path: Path) -> None:
    path, other = write_jsonl(tmp_path / "a.jsonl", 10), write_jsonl(tmp_path / "b.jsonl", 10)
    rows = read([f"{path}:0.5", f"{other}:2.3", path])
    assert Counter(rows.times[:5]) == {1: 5}
    assert Counter(rows.times[5:15]) == {2: 7, 3: 3}
    assert Counter(rows.times[15:]) == {1: 10}
    assert read([f"{path}:0.5", f"{other}:2.3", path]) == rows
    assert read([f"{path}:0.5", f"{other}:2.3", path], seed=1).rows != rows.rows
    with pytest.raises(DataError, match=r"a\.jsonl: expected a weight of more than 0, found 0$"):
        read(f"{path}:0")
    named = write_jsonl(tmp_path / "a.jsonl:3", 1).rename(tmp_path / "a:3")
    assert find(named).weight == 1


def test_split_keeps_rows_whole_and_apart(tmp_path: Path) -> None:
    rows = read(f"{write_jsonl(tmp_path / 'a.jsonl', 10)}:2")
    train, held = rows.split(0.3, seed=0)
    assert (len(train.rows), len(held.rows), set(held.times)) == (7, 3, {1})
    assert {row.origin for row in train.rows} | {row.origin for row in held.rows} == {row.origin for row in rows.rows}
    assert rows.split(0.3, seed=0) == (train, held)
    with pytest.raises(DataError, match="leaves one side empty"):
        rows.split(0.01, seed=0)


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: part/*
---
# About
"""

PROGRAM = """
import sys
from qpack.data import read
from qpack.errors import QpackError
for argument in sys.argv[1:]:
    try:
        print([row.origin + " " + row.text for row in read(argument).rows])
    except QpackError as error:
        print(error)
"""


def from_hub(directory: Path, home: Path, *arguments: str) -> list[str]:
    """What is read of data sets of a hub, in a process that knows no other."""
    with hub.serve(set=directory) as served:
        environment = {"HF_ENDPOINT": served.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments], env=environment, check=True, capture_output=True, text=True
        )
    return done.stdout.splitlines()


def test_data_set_of_the_hub(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    write_jsonl(repo / "data" / "train.jsonl", 1)
    write_jsonl(repo / "data" / "test.jsonl", 1)
    write_jsonl(repo / "extra" / "more.jsonl", 1)
    train, part, revision, weighted, missing, unknown = from_hub(
        repo,
        tmp_path / "home",
        "org/set",
        "org/set/extra",
        f"org/set@{hub.COMMIT}/data/test.jsonl",
        "org/set:3",
        "org/set/nothing",
        "org/unknown",
    )
    assert train == weighted == "['org/set/data/train.jsonl:1 train 0']"
    assert part == "['org/set/extra/more.jsonl:1 more 0']"
    assert revision == "['org/set/data/test.jsonl:1 test 0']"
    assert missing.startswith("org/set: no file of kind")
    assert missing.endswith("in nothing; it has data/test.jsonl, data/train.jsonl, extra/more.jsonl")
    assert unknown.startswith("org/unknown: no such path, and no such data set on http://127.0.0.1")


def test_training_split_that_a_card_declares(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    write_jsonl(repo / "part" / "a.jsonl", 1)
    write_jsonl(repo / "train.jsonl", 1)
    (repo / "README.md").write_text(CARD)
    assert from_hub(repo, tmp_path / "home", "org/set") == ["['org/set/part/a.jsonl:1 a 0']"]
    several = CARD.replace("name: default", "name: one").replace("---\n# ", "- config_name: two\n---\n# ")
    (repo / "README.md").write_text(several)
    (line,) = from_hub(repo, tmp_path / "other", "org/set")
    assert line == "org/set: several configurations, name the files of one as org/set/PART: one (part/*), two ()"


def test_a_reading_that_fails_names_the_row_and_a_skipping_one_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\na\nb,c\nd\n")
    rows = read(path, DataOptions(on_bad_row="skip"))
    assert [row.origin for row in rows.rows] == [f"{path}:2", f"{path}:4"]
    assert [bad.reason for bad in rows.skipped] == ["expected 1 cells as in the header, found 2"]
