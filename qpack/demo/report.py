"""What the demo found: sizes, accuracy on held-out orders, seconds."""

from collections.abc import Mapping
from dataclasses import dataclass

from qpack.sizes import format_size

MIN_ADAPTER = 0.95
"""Least accuracy of an adapter on its own skill."""
MAX_BASE = 0.20
"""Greatest accuracy of the base on an adapter's skill: more, and there was nothing to learn."""
MAX_MERGED_DIFFERENCES = 1
"""Answers in which the merged model may differ from the served adapter: both round to 16 bits, in different places."""


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The figures of one run; accuracies are shares of held-out orders answered to the letter."""

    model: str
    plain_bytes: int
    packed_bytes: int
    packed_bits: float
    """Bits a packed weight."""
    held_out: int
    """Orders asked of each model."""
    base: Mapping[str, float]
    """Accuracy of the base, by skill."""
    adapters: Mapping[str, float]
    """Accuracy of each adapter, by skill."""
    merged_skill: str
    merged: float
    """Accuracy of the merged checkpoint on the skill of its adapter."""
    merged_differences: int
    """Orders that the merged checkpoint answers differently from its adapter, served."""
    seconds: Mapping[str, float]
    """By step."""

    @property
    def failures(self) -> tuple[str, ...]:
        """What is not as it should be, a line each."""
        found = [
            f"adapter {skill} answers {accuracy:.0%} right, expected at least {MIN_ADAPTER:.0%}"
            for skill, accuracy in self.adapters.items()
            if accuracy < MIN_ADAPTER
        ]
        found += [
            f"the base answers {accuracy:.0%} of {skill} right, expected at most {MAX_BASE:.0%}"
            for skill, accuracy in self.base.items()
            if accuracy > MAX_BASE
        ]
        if self.merged_differences > MAX_MERGED_DIFFERENCES:
            found.append(f"the merged model differs from its adapter on {self.merged_differences} orders")
        return tuple(found)

    def table(self) -> str:
        """The figures as lines of text."""
        rows = [
            ("base, 16 bits", format_size(self.plain_bytes)),
            ("base, 4 bits", f"{format_size(self.packed_bytes)}, {self.packed_bits:.3f} bits a packed weight"),
            None,
            (f"right of {self.held_out} held-out orders", ""),
            *((f"  base on {skill}", f"{accuracy:.0%}") for skill, accuracy in self.base.items()),
            *((f"  adapter {skill}, served", f"{accuracy:.0%}") for skill, accuracy in self.adapters.items()),
            (f"  merged {self.merged_skill}", f"{self.merged:.0%}, differs on {self.merged_differences}"),
            None,
            ("seconds", ""),
            *((f"  {step}", f"{seconds:.1f}") for step, seconds in self.seconds.items()),
            ("  in all", f"{sum(self.seconds.values()):.1f}"),
        ]
        width = max(len(row[0]) for row in rows if row) + 2
        lines = ["" if row is None else f"{row[0]:{width}}{row[1]}".rstrip() for row in rows]
        return "\n".join([self.model, *lines])
