"""Whether a training run fits a device, how far it could go there, and what is nearest to it that fits.

Nearest is what changes the result least: first smaller batches with as many more of them in a step, which compute the
same; then shorter sequences.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qpack.estimate.device import Device
from qpack.estimate.model import Model
from qpack.estimate.need import Need
from qpack.estimate.training import training
from qpack.sizes import format_size
from qpack.training.settings import TrainSettings

_LENGTH_STEP = 64
"""Lengths are proposed in multiples of it."""

_LARGEST_BATCH = 4096
"""Larger ones are not looked for."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What training with some settings needs on a device."""

    need: Need
    device: Device
    longest: int | None
    """Tokens that sequences can have at this batch size, at most as many as the model takes; None if not one fits."""
    largest: int | None
    """Sequences that a batch can have at this length; None if not one fits."""
    nearest: Mapping[str, Any] | None
    """Settings to change so that it fits: empty where it does, None where no change helps."""

    @property
    def fits(self) -> bool:
        """Whether the settings fit as they are."""
        return self.need.fits_in(self.device.bytes)

    @property
    def advice(self) -> str:
        """The nearest settings as flags."""
        if self.nearest is None:
            return "none: not even one short sequence fits"
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.nearest.items())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {format_size(size)}" for name, size in self.need.parts.items() if size)
        needs = (
            f"needs {format_size(self.need.bytes)} ({parts}) of {format_size(self.device.bytes)}, {self.device.name}"
        )
        return needs if self.fits else f"{needs}: DOES NOT FIT; nearest {self.advice}"


def fit(model: Model, settings: TrainSettings, device: Device, processes: int = 1) -> Fit:
    """Size a run with ``settings`` on ``device``, of one of ``processes``."""

    def fits(**changes: Any) -> bool:
        return training(model, replace(settings, **changes), device, processes).fits_in(device.bytes)

    steps = model.max_length // _LENGTH_STEP
    return Fit(
        need=training(model, settings, device, processes),
        device=device,
        longest=_most(lambda number: fits(max_length=number * _LENGTH_STEP), steps, _LENGTH_STEP),
        largest=_most(lambda batch: fits(batch_size=batch), _LARGEST_BATCH, 1),
        nearest=_nearest(model, settings, fits),
    )


def _nearest(model: Model, settings: TrainSettings, fits: Callable[..., bool]) -> dict[str, Any] | None:
    if fits():
        return {}
    whole = settings.batch_size * settings.grad_accum
    for batch in range(settings.batch_size - 1, 0, -1):
        changes = {"batch_size": batch, "grad_accum": whole // batch}
        if whole % batch == 0 and fits(**changes):
            return changes
    steps = settings.max_length // _LENGTH_STEP
    smaller = {} if settings.batch_size == 1 else {"batch_size": 1, "grad_accum": whole}
    longest = _most(lambda number: fits(max_length=number * _LENGTH_STEP, **smaller), steps, _LENGTH_STEP)
    if longest is None:
        return None
    return {**smaller, "max_length": longest}


def _most(fits: Callable[[int], bool], limit: int, unit: int) -> int | None:
    """The largest number from 1 to ``limit`` that ``fits``, times ``unit``; whatever fits, all below it do too."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * unit or None
