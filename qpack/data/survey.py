"""What the model would see of some data, before it is trained on: ``qpack data``.

The data goes through the very functions that training puts it through. The base's weights are not read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from qpack.data.encoding import encode, encode_preferences
from qpack.data.examples import IGNORED, Example, Examples, Preferences
from qpack.data.options import DataOptions
from qpack.data.packing import pack
from qpack.data.reading import Arguments, read, read_preferences


@dataclass(frozen=True, slots=True)
class Shown:
    """One sequence as text: its ``FILE:LINE``, and runs of tokens that are learned or are not."""

    origin: str
    runs: Sequence[tuple[str, bool]]


@dataclass(frozen=True, slots=True)
class Survey:
    """All of some data, in numbers.

    Attributes:
        rows: rows that were read, by format.
        skipped: rows left out, as ``FILE:LINE: reason``.
        left_out: fields that no format takes, and in how many rows they stand.
        sequences: sequences in one epoch; both sides of every preference.
        tokens: their tokens.
        learned: how many of these carry loss.
        max_length: where sequences are cut.
        truncated: sequences that were cut there.
        windows: sequences that are a window of a longer text.
        median: the middle length, in tokens.
        longest: the greatest length, in tokens.
        histogram: how many sequences are longer than the bin before and at most so long.
        packed: sequences after packing to ``max_length``, and the share of their places that is filled; None for
            preferences, which are not packed.
        duplicates: sequences whose tokens all stand in an earlier one.
        empty: sequences of which nothing but the end token is learned.
        openings: what the generation prompt holds and the answers do not, and in how many sequences.
        digest: SHA-256 of all tokens and labels, as the adapter's record holds it.
        shown: the first sequences.
    """

    rows: Mapping[str, int]
    skipped: Sequence[str]
    left_out: Mapping[str, int]
    sequences: int
    tokens: int
    learned: int
    max_length: int
    truncated: int
    windows: int
    median: float
    longest: int
    histogram: Mapping[int, int]
    packed: tuple[int, float] | None
    duplicates: int
    empty: int
    openings: Mapping[str, int]
    digest: str
    shown: Sequence[Shown]

    def as_json(self) -> dict[str, Any]:
        """All of it in values that JSON has."""
        return asdict(self)


def survey(
    base: Path | str,
    data: Arguments,
    options: DataOptions = DataOptions(),  # noqa: B008  # frozen
    *,
    max_length: int = 1024,
    preferences: bool = False,
    seed: int = 0,
    examples: int = 3,
    on_progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Read and encode ``data`` for the tokenizer in ``base``, and count.

    Args:
        base: directory of the model; only its tokenizer and generation_config.json are read.
        data: see :mod:`qpack.data.sources`.
        options: how it is read and labelled.
        max_length: the longest sequence, in tokens.
        preferences: the data is for DPO.
        seed: which rows a weight that is no whole number draws.
        examples: how many sequences to show.
        on_progress: called with the rows encoded and their number.

    Raises:
        CheckpointError: the base has no tokenizer.
        DataError: as :func:`~qpack.data.read` and :func:`~qpack.data.encode`.
    """
    read_rows = read_preferences if preferences else read
    rows = read_rows(data, options, seed=seed)

    from qpack.quiet import quiet_libraries

    with quiet_libraries():
        from qpack.loading.tokenizer import load_tokenizer

        base = Path(base)
        tokenizer = load_tokenizer(base)
        encode_rows: Any = encode_preferences if preferences else encode
        dataset = encode_rows(rows, tokenizer, base, options, max_length, on_progress=on_progress)
    found: Examples = dataset.examples.sides if isinstance(dataset.examples, Preferences) else dataset.examples
    lengths, learned = found.lengths, found.learned
    groups = None if preferences else len(pack(lengths, max_length))

    def show(example: Example) -> Shown:
        pairs = zip(example["input_ids"], example["labels"], strict=True)
        runs = groupby(pairs, key=lambda pair: pair[1] != IGNORED)
        return Shown(
            example["origin"], [(str(tokenizer.decode([token for token, _ in run])), key) for key, run in runs]
        )

    return Survey(
        rows=rows.formats,
        skipped=[str(row) for row in dataset.skipped],
        left_out=rows.left_out,
        sequences=len(found),
        tokens=sum(lengths),
        learned=sum(learned),
        max_length=max_length,
        truncated=dataset.truncated,
        windows=dataset.windows,
        median=median(lengths),
        longest=max(lengths),
        histogram=_histogram(lengths, max_length),
        packed=None if groups is None else (groups, sum(lengths) / (groups * max_length)),
        duplicates=found.duplicates,
        empty=sum(count <= 1 for count in learned),
        openings=dataset.openings,
        digest=dataset.digest,
        shown=[show(found[index]) for index in range(min(examples, len(found)))],
    )


def _histogram(lengths: Sequence[int], max_length: int) -> dict[int, int]:
    """How many are at most so long and longer than the bin before; bins double, up to ``max_length``."""
    edge, bins = 16, list[int]()
    while edge < max_length:
        bins.append(edge)
        edge *= 2
    counts = dict.fromkeys([*bins, max_length], 0)
    for length in lengths:
        counts[next(top for top in counts if length <= top)] += 1
    used = [top for top, count in counts.items() if count]
    return {top: count for top, count in counts.items() if used[0] <= top <= used[-1]}
