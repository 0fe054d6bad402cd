"""Names of tensors that differ only in numbers, as one: ``model.layers.{0-31}.mlp.experts.{0-5,7}.w1.weight``.

An error that lists tensors lists all of them, and those of a large model are thousands. A folded name stands for
exactly the names that it was made of: every combination of its numbers is one of them.
"""

import re
from collections import defaultdict
from collections.abc import Iterable


def fold(names: Iterable[str]) -> list[str]:
    """Few folded names for all ``names``, layer 2 before layer 10."""
    rows = {tuple(name.split(".")) for name in names}
    for position in reversed(range(max(map(len, rows), default=0))):
        rows = _fold_at(position, rows)
    return [".".join(row) for row in sorted(rows, key=_in_order)]


def _fold_at(position: int, rows: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Make one row of those that differ in the number at ``position`` alone."""
    folded = set()
    numbers = defaultdict(list)
    for row in rows:
        before, number, after = row[:position], row[position : position + 1], row[position + 1 :]
        if number and number[0].isdecimal() and str(int(number[0])) == number[0]:
            numbers[before, after].append(int(number[0]))
        else:
            folded.add(row)
    return folded | {(*before, _ranges(found), *after) for (before, after), found in numbers.items()}


def _ranges(numbers: list[int]) -> str:
    """``{0-5,7}``, or the number if it is one alone."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ",".join("-".join(map(str, run)) for run in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


def _in_order(row: tuple[str, ...]) -> list[tuple[bool, int, str]]:
    """What to sort rows by: numbers by their value, the first one of a range."""
    first = [re.match(r"\{?(\d+)", part) for part in row]
    return [(number is None, int(number[1]) if number else 0, part) for number, part in zip(first, row, strict=True)]
