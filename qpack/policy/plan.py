"""What is to be written, as plain data: which tensors come out of which source tensor, and how each is stored.

A plan is a list of recipes in the order of the source's files. `modules` makes it from a model's structure; Rust
carries it out (`qpack._core.pack`) without knowing about models.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Packing:
    """How one weight is stored in NF4."""

    blocksize: int = 64
    """Weights per block scale, one of ``qpack._core.BLOCKSIZES``."""
    double_quant: bool = True
    """Whether the block scales are themselves in 8 bits."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor to write, made from a source tensor or a part of it.

    The source is seen as matrices of shape (rows, columns): the columns are those of ``shape``, the rows follow from
    the source's own shape, and what stands before them counts the matrices (a fused tensor of experts has one an
    expert).
    """

    name: str
    shape: tuple[int, ...]
    """As the model sees it; (out_features, in_features) where packed."""
    packing: Packing | None = None
    """None keeps the tensor in a float type, or as it is."""
    dtype: str | None = None
    """Torch's name of the float type to keep it in, or that a packed one is said to be of; None takes the source's own,
    decoded where it is encoded."""
    matrix: int = 0
    """Which matrix of the source."""
    rows: tuple[int, int] = (0, 1)
    """First row and step: (0, 2) and (1, 2) separate interleaved rows, as of gpt-oss's gate_up_proj."""
    transpose: bool = False
    """Whether the matrix is stored as (in_features, out_features); ``rows`` then count its columns."""
    reason: str = ""
    """Why it is kept, in words for the report; empty for a packed weight."""

    @property
    def weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that is made from one source tensor. Parts stand in the order of their bytes in the source."""

    source: str
    """Name of the source tensor."""
    parts: tuple[Part, ...]
    scale: str | None = None
    """Name of the tensor that decodes it: FP8's ``weight_scale_inv`` or MXFP4's ``scales``."""
    block: tuple[int, int] | None = None
    """Rows and columns that one scale of FP8 is for; None where one scale is for all."""
