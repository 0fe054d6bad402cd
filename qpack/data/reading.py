"""Read and check all of the data, before a model or a tokenizer is touched."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qpack.data.files import records
from qpack.data.formats import formats, recognise
from qpack.data.options import DataOptions
from qpack.data.rows import BadRow, Comparison, Conversation, Document, Rows
from qpack.data.sources import find
from qpack.errors import DataError

Arguments = Path | str | Sequence[Path | str]
"""One DATA argument or several, in the form that :mod:`qpack.data.sources` describes."""


def read(
    arguments: Arguments,
    options: DataOptions = DataOptions(),  # noqa: B008  # frozen
    *,
    seed: int = 0,
) -> Rows[Conversation | Document]:
    """Read conversations and texts. ``seed`` decides which rows a weight that is no whole number draws.

    Raises:
        DataError: a file cannot be read or holds no row, or with ``on_bad_row="fail"`` a row cannot be used; the
            message names file and line.
        HubError: the hub cannot be reached, or has no such data set.
    """
    rows: Rows[Conversation | Document] = _read(arguments, options, seed, preferences=False)
    return rows


def read_preferences(
    arguments: Arguments,
    options: DataOptions = DataOptions(),  # noqa: B008  # frozen
    *,
    seed: int = 0,
) -> Rows[Comparison]:
    """Read preferences, as :func:`read` does conversations."""
    rows: Rows[Comparison] = _read(arguments, options, seed, preferences=True)
    return rows


def _read(arguments: Arguments, options: DataOptions, seed: int, *, preferences: bool) -> Rows[Any]:
    allowed = formats(preferences=preferences, only=options.format)
    sources = [find(one) for one in ([arguments] if isinstance(arguments, Path | str) else arguments)]
    rows: list[Any] = []
    times: list[int] = []
    skipped: list[BadRow] = []
    found, left_out = Counter[str](), Counter[str]()
    for place, source in enumerate(sources):
        draw = random.Random(f"{seed} {place}")
        begin = len(rows)
        for path, name in source.files:
            for record in records(path, name):
                try:
                    if isinstance(record, BadRow):
                        raise record
                    origin, values = record
                    given = {key: value for key, value in values.items() if value is not None}
                    try:
                        form = recognise(given, allowed)
                        rows.append(form.convert(given, origin))
                    except DataError as error:
                        raise BadRow(origin, str(error)) from None
                except BadRow as error:
                    if options.on_bad_row == "fail":
                        raise
                    skipped.append(error)
                else:
                    found[form.name] += 1
                    left_out.update(key for key in given if key not in form.required + form.optional)
        if len(rows) == begin:
            reason = f"; {len(skipped)} rows were skipped, the first: {skipped[0]}" if skipped else ""
            raise DataError(f"{source.name}: no row to train on{reason}")
        times += _times(len(rows) - begin, source.weight, draw)
    used = [(row, count) for row, count in zip(rows, times, strict=True) if count]
    return Rows(
        rows=[row for row, _ in used],
        times=[count for _, count in used],
        paths=[path for source in sources for path, _ in source.files],
        formats=dict(found),
        skipped=skipped,
        left_out=dict(left_out),
    )


def _times(rows: int, weight: float, draw: random.Random) -> list[int]:
    """How often each row is used: the whole part of the weight, and once more for as many rows as its rest asks."""
    whole = int(weight)
    more = set(draw.sample(range(rows), round(rows * (weight - whole))))
    return [whole + (index in more) for index in range(rows)]
