"""What adapters change in the weights of a base, as plain data: where the factors are, and which rows they are for.

`qpack.adapters.trained` makes these from PEFT's files; Rust carries them out (`qpack._core.merge`) without knowing
about models. A weight is seen as a matrix as it lies in the base's file: its last dimension are the columns, all others
together the rows. So a transposed weight has its factors' views transposed, and one expert of a fused weight is a range
of rows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in an adapter's file."""

    file: Path
    name: str


@dataclass(frozen=True, slots=True)
class View:
    """A matrix in a stored tensor: its element (i, j) is ``tensor.flat[offset + i * strides[0] + j * strides[1]]``."""

    tensor: Stored
    strides: tuple[int, int]
    offset: int = 0


@dataclass(frozen=True, slots=True)
class LowRank:
    """``scale * left @ right``, added to some rows of a weight."""

    left: View
    """(rows, r)"""
    right: View
    """(r, columns)"""
    r: int
    scale: float
    rows: tuple[int, int] | None = None
    """First row and the one after the last; None for all rows."""


@dataclass(frozen=True, slots=True)
class Change:
    """Low-rank changes of one weight, in the order in which they are added, and what DoRA does to the sum."""

    terms: tuple[LowRank, ...]
    magnitude: Stored | None = None
    """What the norms of the sum's rows become: ``m / |W + D| * (W + D)``, for a weight of two dimensions."""
    by_columns: bool = False
    """Whether they are norms of columns, as for a weight that lies there as (in_features, out_features)."""
    of: str | None = None
    """The weight that this is added to, where the base has none of this name: what was tied to another gets its own."""


@dataclass(frozen=True, slots=True)
class Replace:
    """A tensor that takes the place of a whole one, or that the base does not have."""

    tensor: Stored


@dataclass(frozen=True, slots=True)
class ReplaceRows:
    """Rows of a weight that become those of a tensor of shape (len(rows), columns)."""

    tensor: Stored
    rows: tuple[int, ...]


AnyChange: TypeAlias = Change | Replace | ReplaceRows
