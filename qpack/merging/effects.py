"""What adapters changed in each weight, beside what quantization changes there.

Where the error of quantization is larger than the change, the merged weight depends more on which base was merged onto,
or on being packed again, than on the adapter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from qpack.inspection import kind_of, reading_order
from qpack.manifest import WeightError


@dataclass(frozen=True, slots=True)
class Effect:
    """Frobenius norms of one weight, or of several as if they were one."""

    change: float
    """Of what the adapters add."""
    weight: float
    """Of the weight before."""
    error: float | None
    """Of what quantization adds; None where that is not known, or the weight is not packed."""

    @property
    def ratio(self) -> float | None:
        """Change over error; None where no error is known, or it is zero."""
        return self.change / self.error if self.error else None

    @property
    def is_small(self) -> bool:
        """Whether the error is larger than the change."""
        return self.error is not None and self.error > self.change

    def as_json(self) -> dict[str, float | None]:
        """Norms and ratio, as JSON can say them."""
        return asdict(self) | {"ratio": self.ratio}

    @classmethod
    def of_all(cls, effects: Sequence["Effect"]) -> "Effect":
        """Those of several weights together; the error is known if all are."""
        errors = [effect.error for effect in effects]
        known = [error for error in errors if error is not None]
        return cls(
            change=math.hypot(*(effect.change for effect in effects)),
            weight=math.hypot(*(effect.weight for effect in effects)),
            error=math.hypot(*known) if len(known) == len(errors) else None,
        )


def measure_effects(
    changes: Mapping[str, tuple[float, float]],
    errors: Mapping[str, WeightError],
    parts: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Effect]:
    """The effect on every weight of ``changes`` (norms of change and weight by name).

    ``errors`` are those of packed weights, ``parts`` the weights that each one is made into, if others: its experts.
    """
    effects = {}
    for name, (change, weight) in changes.items():
        packed = [errors[part] for part in (parts or {}).get(name, (name,)) if part in errors]
        error = math.hypot(*(found.relative * found.norm for found in packed)) if packed else None
        effects[name] = Effect(change, weight, error)
    return effects


def by_kind(effects: Mapping[str, Effect]) -> dict[str, dict[str, Effect]]:
    """The effects by kind of weight, each by name in the order of layers."""
    kinds: dict[str, dict[str, Effect]] = {}
    for name in sorted(effects, key=reading_order):
        kinds.setdefault(kind_of(name), {})[name] = effects[name]
    return kinds
