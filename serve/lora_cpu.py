"""Multi-LoRA products on a CPU: a few batched matrix products for all adapters of a step, none for the base.

In vLLM 0.32 a token of the base has slot -1, and its torch ops gather ``weights[slots]``: -1 picks the LAST slot, so
while all slots are full a base request that shares a batch with an adapter's is answered with that adapter's weights.
The gather also copies a whole (rank, features) matrix for every token, in every layer.

Here the tokens of a step are sorted by slot once (`plan`); each layer multiplies by it (`take`, `shrink`, `expand`)::

    slots of the rows 0..5    2 0 -1 2 0 1
    rows of slots 0, 1, 2     1 4   5 0   0 3        slot 1 has one row, and is filled up
    x of these rows           (3, 2, in_features) @ A^T (3, in_features, rank) @ B^T (3, rank, out_features)

An adapter with many rows, as when a prompt is read, has a product of its own. Rows of the base are in no plan. Which
other rows are in the batch changes nothing about a row but how its sums are rounded.

Without bfloat16 instructions a product in bfloat16 is emulated and slow; there it is computed in float32.

GPUs use other kernels, which handle -1 and are not touched.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

# Adapters with at most so many rows share a product; filling up costs little next to what one more product costs.
_FEW = 16


@dataclass(frozen=True, slots=True)
class Share:
    """The rows of one adapter, or of several with few rows, in neighbouring slots."""

    slots: slice
    rows: torch.Tensor | slice
    """(slots * most,): the rows of each slot, filled up with any; a slice if they are consecutive and of one slot."""
    places: torch.Tensor | None
    """(tokens,): where in ``rows`` each token is, by ascending rows; None if all are in their order."""
    runs: tuple[tuple[slice, slice], ...]
    """Consecutive rows, and which of the tokens they are."""


Plan = tuple[Share, ...]


def plan(slots: Sequence[int]) -> Plan:
    """Sort the rows of a step by their slots; -1 stands for the base."""
    rows: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        if slot >= 0:
            rows.setdefault(slot, []).append(row)
    few = {slot for slot in rows if len(rows[slot]) <= _FEW}
    shares = [_share({slot: rows[slot]}) for slot in sorted(rows.keys() - few)]
    if few:
        shares.append(_share({slot: rows[slot] for slot in sorted(few)}))
    return tuple(shares)


def _share(rows: dict[int, list[int]]) -> Share:
    first, last = min(rows), max(rows)
    slots = slice(first, last + 1)
    place: dict[int, int] = {}
    most = max(map(len, rows.values()))
    for slot, taken in rows.items():
        place |= {row: (slot - first) * most + number for number, row in enumerate(taken)}
    tokens = sorted(place)
    runs = tuple(_runs(tokens))
    if first == last and len(runs) == 1:
        return Share(slots, runs[0][0], None, runs)
    filled = [tokens[0]] * (last + 1 - first) * most
    for row in tokens:
        filled[place[row]] = row
    return Share(slots, torch.tensor(filled), torch.tensor([place[row] for row in tokens]), runs)


def _runs(tokens: list[int]) -> Iterator[tuple[slice, slice]]:
    begin = 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or tokens[end] != tokens[end - 1] + 1:
            yield slice(tokens[begin], tokens[end - 1] + 1), slice(begin, end)
            begin = end


def take(share: Share, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the share's rows of x, (slots, most, features), in the dtype to multiply in."""
    if isinstance(share.rows, slice):
        return x[share.rows].to(dtype).unsqueeze(0)
    slots = share.slots.stop - share.slots.start
    return x.index_select(0, share.rows).to(dtype).view(slots, -1, x.shape[1])


def shrink(share: Share, taken: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return ``x A^T`` of the share's rows, (slots, most, rank).

    Args:
        share: whose rows.
        taken: (slots, most, in_features), as from `take`.
        a: (all slots, 1, rank, in_features).
    """
    return torch.bmm(taken, _weights(share, a, taken.dtype))


def expand(share: Share, h: torch.Tensor, b: torch.Tensor, y: torch.Tensor, column: int) -> None:
    """Add ``h B^T`` to the share's rows of y, to the columns from ``column`` on.

    Args:
        share: whose rows.
        h: (slots, most, rank), as from `shrink`.
        b: (all slots, 1, features, rank).
        y: (rows, all columns); features that it has no room for are vLLM's padding.
        column: the first one.
    """
    columns = y[:, column : column + b.shape[-2]]
    fitting = b[..., : columns.shape[1], :]
    product = torch.bmm(h, _weights(share, fitting, h.dtype)).flatten(0, 1).to(y.dtype)
    if share.places is not None:
        product = product.index_select(0, share.places)
    for rows, tokens in share.runs:
        columns[rows] += product[tokens]


def _weights(share: Share, stacked: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return stacked[share.slots, 0].to(dtype).transpose(1, 2)
