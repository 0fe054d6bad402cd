"""Memory for one purpose, by what it holds, and the GPUs that have it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qpack.sizes import format_size

CARDS = (12, 16, 24, 32, 48, 80, 96, 141)
"""GB of typical GPUs. Each has a little more than its name says (24 GB: 24,564 MiB = 25.8 * 10**9 bytes)."""

ALLOWANCE = 10**9
"""CUDA context, workspaces of the libraries, CUDA graphs and the allocator's rounding: not derived, 0.5 to 1 GB as seen
with `nvidia-smi` beside torch's own count."""


@dataclass(frozen=True, slots=True)
class Need:
    """Memory for one purpose. As a string: one line."""

    purpose: str
    """What for, with length and batch."""
    parts: Mapping[str, int]
    """Bytes by what they hold."""
    pageable: int = 0
    """How many of them may move to the CPU while memory is short (QLoRA's paged optimizer)."""
    share: float = 1.0
    """Of the memory that may be used."""

    @property
    def bytes(self) -> int:
        """In all."""
        return sum(self.parts.values())

    def fits_in(self, size: int) -> bool:
        """Whether it fits ``size`` bytes, with everything pageable paged out."""
        return self.bytes - self.pageable <= self.share * size

    def fits(self, gigabytes: float) -> bool:
        """Whether it fits a GPU of so many GB."""
        return self.fits_in(int(gigabytes * 10**9))

    def smallest(self, cards: Sequence[int] = CARDS) -> int | None:
        """The smallest of ``cards`` (GB) that it fits."""
        return min(filter(self.fits, cards), default=None)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {format_size(size)}" for name, size in self.parts.items())
        card = self.smallest()
        where = f"fits a GPU of {card} GB" if card else f"fits no GPU of up to {CARDS[-1]} GB"
        paged = " with its optimizer paged" if card and self.bytes > self.share * card * 10**9 else ""
        return f"{self.purpose}: {format_size(self.bytes)} ({parts}); {where}{paged}"
