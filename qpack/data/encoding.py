"""From rows to token ids and labels.

The loss falls on what the assistant says, its end token included; with ``loss="all"`` on everything, and on the whole
of a plain text.

No special tokens are added to a rendered template: it holds its own, and a server adds none either. A plain text gets
the BOS that its tokenizer puts before a text, one, and always an EOS behind it. So there is never a second BOS, and an
EOS is learned wherever something ends. Whether a token is learned or is padding is told by its place, never by its id:
a tokenizer whose pad token is its EOS teaches the model to stop like any other.

A conversation longer than ``max_length`` loses its end, and is counted; what was cut off got no EOS. A longer text is
cut into windows, each beginning with the last token of the one before, so that every token is predicted once.

Refused: a tokenizer without chat template, EOS or offsets, and the row of which ``max_length`` would leave nothing to
learn or that the template cannot say (see :mod:`qpack.data.template`).
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from qpack.data.examples import Example, Examples, Preference, Preferences
from qpack.data.options import DataOptions
from qpack.data.rows import BadRow, Comparison, Conversation, Document, Message, Row, Rows
from qpack.data.template import Rendered, Span, Template
from qpack.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 512
"""Rows that are tokenized together, on all cores; few enough that progress is seen."""

Item = TypeVar("Item", Example, Preference)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Dataset(Generic[Item]):
    """What the model will see.

    Attributes:
        examples: sequences in the order of the rows, or pairs of them; as often as their weight says.
        truncated: sequences that were cut at ``max_length``.
        windows: sequences that are a window of a longer text.
        skipped: rows left out with ``on_bad_row="skip"``, by reading or by encoding.
        template: the chat template, if a conversation was rendered.
        openings: what the generation prompt holds and the answers learned do not, and how many sequences it concerns.
        digest: SHA-256 of all tokens and labels: two runs with the same digest see the same data.
    """

    examples: Sequence[Item]
    truncated: int
    windows: int
    skipped: Sequence[BadRow]
    template: str | None
    openings: Mapping[str, int]
    digest: str


def encode(
    rows: Rows[Conversation | Document],
    tokenizer: "PreTrainedTokenizerBase",
    base: Path,
    options: DataOptions,
    max_length: int,
    *,
    on_progress: Progress | None = None,
) -> Dataset[Example]:
    """Render, tokenize and label every row.

    Args:
        rows: as :func:`~qpack.data.read` gives them.
        tokenizer: of the base; it is not changed.
        base: the directory of the base, for messages, and for the stop tokens of its generation_config.json.
        options: how; the same that the rows were read with.
        max_length: the longest sequence, in tokens.
        on_progress: called with the rows done and their number.

    Raises:
        DataError: the tokenizer cannot be used, or a row cannot; the message names its ``FILE:LINE``.
    """
    encoder = _Encoder(tokenizer, base, options, max_length)
    for batch in _batches(rows, on_progress):
        found = encoder.sequences([row for row, _ in batch])
        for (row, times), sequences in zip(batch, found, strict=True):
            if isinstance(sequences, BadRow):
                encoder.refuse(sequences)
            else:
                encoder.add(sequences, row.origin, times)
    return encoder.dataset(rows, encoder.examples)


def encode_preferences(
    rows: Rows[Comparison],
    tokenizer: "PreTrainedTokenizerBase",
    base: Path,
    options: DataOptions,
    max_length: int,
    *,
    on_progress: Progress | None = None,
) -> Dataset[Preference]:
    """Render, tokenize and label both sides of every comparison, as :func:`encode` does conversations.

    Raises:
        DataError: as :func:`encode`; ``loss="all"``, since only answers are compared; two sides that are the same as
            far as ``max_length`` lets them be seen.
    """
    if options.loss == "all":
        raise DataError("loss: expected 'assistant' for preferences, which compare answers alone, found 'all'")
    encoder = _Encoder(tokenizer, base, options, max_length)
    for batch in _batches(rows, on_progress):
        found = iter(encoder.sequences([side for row, _ in batch for side in _sides(row)]))
        for (row, times), chosen, rejected in zip(batch, found, found, strict=True):
            try:
                pair = [_one(chosen, row.origin, "chosen"), _one(rejected, row.origin, "rejected")]
                if pair[0].ids == pair[1].ids:
                    raise BadRow(row.origin, f"chosen and rejected are the same within max_length {max_length}")
                encoder.add(pair, row.origin, times)
            except BadRow as error:
                encoder.refuse(error)
    return encoder.dataset(rows, Preferences(encoder.examples))


def _sides(row: Comparison) -> list[Conversation]:
    """Both sides as conversations of which the answer is learned."""
    before = len(row.prompt)

    def side(answer: Sequence[Message]) -> Conversation:
        said = [before + index for index, message in enumerate(answer) if message["role"] == "assistant"]
        return Conversation(row.origin, [*row.prompt, *answer], said, row.tools)

    return [side(row.chosen), side(row.rejected)]


def _one(sequences: "list[_Tokens] | BadRow", origin: str, name: str) -> "_Tokens":
    if isinstance(sequences, BadRow):
        raise BadRow(origin, f"{name}: {sequences.reason}")
    if len(sequences) > 1:
        raise BadRow(
            origin, f"{name}: its turns do not make one sequence, since the chat template rewrites earlier ones"
        )
    return sequences[0]


def _batches(rows: Rows[Row], on_progress: Progress | None) -> Iterator[list[tuple[Row, int]]]:
    """Yield the rows with how often each is used, so many at once as are tokenized together."""
    total = len(rows.rows)
    for begin in range(0, total, _BATCH):
        if on_progress:
            on_progress(begin, total)
        end = begin + _BATCH
        yield list(zip(rows.rows[begin:end], rows.times[begin:end], strict=True))
    if on_progress:
        on_progress(total, total)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A sequence, and which of its tokens are learned."""

    ids: list[int]
    learned: list[Span]
    opening: str = ""
    truncated: bool = False
    window: bool = False


class _Encoder:
    """Turns rows into tokens, a batch at a time, and keeps count of what befell them."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", base: Path, options: DataOptions, max_length: int) -> None:
        if not tokenizer.is_fast:
            raise DataError(f"{base}: the tokenizer gives no character offsets; add its tokenizer.json")
        if tokenizer.eos_token is None:
            raise DataError(f"{base}: the tokenizer has no eos_token, so the model could not learn to stop")
        self._tokenizer, self._base, self._options, self._max_length = tokenizer, base, options, max_length
        self.examples = Examples()
        self._template: Template | None = None
        self._skipped: list[BadRow] = []
        self._openings = Counter[str]()
        self._truncated = self._windows = 0

    def sequences(self, rows: Sequence[Conversation | Document]) -> list[list[_Tokens] | BadRow]:
        """The sequences of each row, or why it cannot be used."""
        rendered = [self._render(row) for row in rows]
        texts = self._tokenize([part for parts in rendered if not isinstance(parts, BadRow) for part in parts])
        documents = self._frame([row.text for row in rows if isinstance(row, Document)])
        found: list[list[_Tokens] | BadRow] = []
        for row, parts in zip(rows, rendered, strict=True):
            if isinstance(parts, BadRow):
                found.append(parts)
            elif isinstance(row, Document):
                found.append(self._windowed(next(documents)))
            else:
                found.append(self._cut(list(islice(texts, len(parts))), row.origin))
        return found

    def add(self, sequences: Sequence[_Tokens], origin: str, times: int) -> None:
        """Take what was made of one row."""
        begin = len(self.examples)
        for sequence in sequences:
            self.examples.append(sequence.ids, sequence.learned, origin)
            self._truncated += sequence.truncated
            self._windows += sequence.window
            if sequence.opening:
                self._openings[sequence.opening] += 1
        self.examples.repeat(begin, times)

    def refuse(self, row: BadRow) -> None:
        """Take note of a row that cannot be used, or stop at it."""
        if self._options.on_bad_row == "fail":
            raise row
        self._skipped.append(row)

    def dataset(self, rows: Rows[Row], examples: Sequence[Item]) -> Dataset[Item]:
        """Close the books.

        Raises:
            DataError: no row is left.
        """
        if not examples:
            raise DataError(f"no row to train on: {len(self._skipped)} were skipped, the first: {self._skipped[0]}")
        return Dataset(
            examples=examples,
            truncated=self._truncated,
            windows=self._windows,
            skipped=[*rows.skipped, *self._skipped],
            template=self._template.text if self._template else None,
            openings=dict(self._openings),
            digest=self.examples.digest(),
        )

    def _render(self, row: Conversation | Document) -> list[Rendered] | BadRow:
        if isinstance(row, Document):
            return []
        if self._template is None:
            self._template = Template(self._tokenizer, self._base, self._options.chat_template)
        try:
            return self._template.render(row)
        except DataError as error:
            return BadRow(row.origin, str(error))

    def _tokenize(self, texts: Sequence[Rendered]) -> Iterator[_Tokens]:
        """Tokenize what the template rendered; a token is learned if it begins inside a learned range."""
        if not texts:
            return
        encoding = self._tokenizer(
            [rendered.text for rendered in texts],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for rendered, ids, offsets in zip(texts, encoding["input_ids"], encoding["offset_mapping"], strict=True):
            begins = [begin for begin, _ in offsets]
            spans = [(0, len(rendered.text))] if self._options.loss == "all" else rendered.learned
            learned = [(bisect_left(begins, start), bisect_left(begins, end)) for start, end in spans]
            yield _Tokens(ids, learned, rendered.opening)

    def _cut(self, sequences: list[_Tokens], origin: str) -> list[_Tokens] | BadRow:
        """Cut a conversation's sequences at ``max_length``; one of which nothing learned remains is left out."""
        limit = self._max_length
        kept = []
        for sequence in sequences:
            # The first token is never learned: see Example.
            if any(max(start, 1) < min(end, limit) for start, end in sequence.learned):
                cut = len(sequence.ids) > limit
                kept.append(replace(sequence, ids=sequence.ids[:limit], truncated=True) if cut else sequence)
        if kept:
            return kept
        length = len(sequences[0].ids)
        reason = f"max_length {limit} cuts the {length} tokens before the assistant speaks"
        return BadRow(origin, f"nothing left to learn: {reason}")

    def _frame(self, texts: list[str]) -> Iterator[list[int]]:
        """Tokenize plain texts, with one BOS where the tokenizer wants it, and an EOS."""
        if not texts:
            return
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        for ids in self._tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]:
            doubled = ids[:2] == [bos, bos]  # the text brought its own
            yield ids[doubled:] + ([] if ids[-1] == eos else [eos])

    def _windowed(self, ids: list[int]) -> list[_Tokens]:
        """Cut a text into windows that overlap by one token, which the first of them predicts."""
        limit = self._max_length
        windows = [ids[start : start + limit] for start in range(0, max(len(ids) - 1, 1), limit - 1)]
        return [_Tokens(window, [(0, len(window))], window=len(windows) > 1) for window in windows]
