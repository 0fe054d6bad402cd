"""From files to records: JSON objects, rows of a table, or whole texts, each with where it stands.

========  ===========================================  ===========================================================
suffix    holds                                        a record's place
========  ===========================================  ===========================================================
.jsonl    an object a line; blank lines are skipped    its line
.json     a list of objects, or as .jsonl              the line on which it begins
.csv .tsv a table with a header                        the line on which its row begins
.parquet  a table                                      its row, from 1
.txt .md  one text                                     the file
========  ===========================================  ===========================================================

What of one record is malformed comes as a :class:`~qpack.data.rows.BadRow` in its place, so that a reader may skip it;
a file that breaks off in the middle of a table or list is refused whole.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qpack.data.rows import BadRow
from qpack.errors import DataError

Found = tuple[str, dict[str, Any]] | BadRow
"""A record and its ``FILE:LINE``, or why there is none."""


def records(path: Path, name: str) -> Iterator[Found]:
    """Yield every record of the file; ``name`` is what messages call it.

    Raises:
        DataError: the file cannot be read, or is of no known kind.
    """
    if path.suffix not in READERS:
        raise DataError(f"{name}: expected a file of kind {', '.join(READERS)}, found {path.suffix!r}")
    try:
        yield from READERS[path.suffix](path, name)
    except OSError as error:
        raise DataError(f"{name}: {error.strerror or error}") from None


def _jsonl(path: Path, name: str) -> Iterator[Found]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _line(line, f"{name}:{number}")


def _line(line: bytes, origin: str) -> Found:
    try:
        return _object(json.loads(line.decode("utf-8")), origin)
    except UnicodeDecodeError as error:
        return BadRow(origin, f"not UTF-8: {error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRow(origin, f"not JSON: {error.msg} at column {error.colno}")


def _json(path: Path, name: str) -> Iterator[Found]:
    """A list, read an element at a time so that each has its line; objects one a line where it is no list."""
    with path.open("rb") as file:
        is_list = next((line.strip()[:1] for line in file if line.strip()), b"") == b"["
    if not is_list:
        yield from _jsonl(path, name)
        return
    text = _decoded(path, name)
    decoder = json.JSONDecoder()
    position, line, counted = _skip(text, text.index("[") + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
        yield _object(value, f"{name}:{line}")
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(f"{name}:{text.count(chr(10), 0, position) + 1}: not JSON: expected ',' or ']'")
    if text[position + 1 :].strip():
        raise DataError(f"{name}: not JSON: something follows the list")


def _skip(text: str, position: int) -> int:
    """The next position that is no white space of JSON."""
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _csv(path: Path, name: str) -> Iterator[Found]:
    csv.field_size_limit(sys.maxsize)  # a conversation may well be longer than the 128 kB that it is at first
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            header = next(rows, [])
            line = rows.line_num
            for row in rows:
                origin, line = f"{name}:{line + 1}", rows.line_num
                if len(row) == len(header):
                    yield origin, dict(zip(header, row, strict=True))
                elif row:
                    yield BadRow(origin, f"expected {len(header)} cells as in the header, found {len(row)}")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8: {error.reason} at byte {error.start}") from None
    except csv.Error as error:
        raise DataError(f"{name}:{rows.line_num}: not CSV: {error}") from None


def _parquet(path: Path, name: str) -> Iterator[Found]:
    try:
        from pyarrow import ArrowException  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise DataError(f"{name}: Parquet needs pyarrow, which is not installed (pip install pyarrow)") from None
    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}:{number}", _without_nulls(row)
    except ArrowException as error:
        raise DataError(f"{name}: not a Parquet file: {str(error).splitlines()[0]}") from None


def _without_nulls(value: Any) -> Any:
    """A table gives every object the keys of all others, null where they had none."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _text(path: Path, name: str) -> Iterator[Found]:
    yield name, {"text": _decoded(path, name)}


def _decoded(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8: {error.reason} at byte {error.start}") from None


def _object(value: object, origin: str) -> Found:
    if isinstance(value, dict):
        return origin, value
    return BadRow(origin, f"expected an object, found {'a list' if isinstance(value, list) else 'a plain value'}")


READERS: dict[str, Callable[[Path, str], Iterator[Found]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _text,
}
"""How a file is read, by its suffix."""

TEXTS = (".txt", ".md")
"""Suffixes of plain text."""
