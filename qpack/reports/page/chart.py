"""The error of each kind of module over the layers, drawn as SVG: one line a kind, a mark a layer, a title a mark.

Kinds differ in colour and in the shape of their marks, so that the drawing reads without colours too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from qpack.inspection import Inspection, TensorReport
from qpack.reports.page.axis import round_numbers
from qpack.reports.text import percent

_WIDTH, _HEIGHT = 960, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 48
_MARKS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",  # circle
    "M-3.6,-3.6h7.2v7.2h-7.2z",  # square
    "M0,-4.8L4.6,3.6H-4.6z",  # triangle
    "M0,-5L5,0L0,5L-5,0z",  # diamond
    "M0,4.8L4.6,-3.6H-4.6z",  # triangle, down
    "M-1.5,-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",  # plus
    "M-5,-2.6h10v5.2h-10z",  # bar
    "M-2.6,-5h5.2v10h-5.2z",  # post
)


@dataclass(frozen=True, slots=True)
class Chart:
    """The drawing, its legend as list items, and its numbers: the mean relative error of each kind in each layer."""

    svg: str
    legend: str
    kinds: tuple[str, ...]
    table: tuple[tuple[int, tuple[float | None, ...]], ...]
    """Layer and one error a kind."""


def chart(inspection: Inspection) -> Chart | None:
    """Draw the errors of ``inspection``; None if no layer's are known."""
    series: dict[str, dict[int, list[TensorReport]]] = {}
    for kind in inspection.by_kind():
        for tensor in kind.tensors:
            if tensor.error is not None and tensor.layer is not None:
                series.setdefault(kind.name, {}).setdefault(tensor.layer, []).append(tensor)
    if not series:
        return None
    means = {kind: {layer: _mean(tensors) for layer, tensors in layers.items()} for kind, layers in series.items()}
    layers = sorted({layer for values in means.values() for layer in values})
    table = tuple((layer, tuple(values.get(layer) for values in means.values())) for layer in layers)
    legend = "\n".join(
        f'<li><svg class="s{index % 8}" viewBox="-6 -6 12 12" aria-hidden="true"><path d="{_mark(index)}"/></svg>'
        f"<b>{escape(kind)}</b> {percent(math.fsum(values.values()) / len(values))}</li>"
        for index, (kind, values) in enumerate(means.items())
    )
    return Chart(_svg(means, layers), legend, tuple(means), table)


def _mean(tensors: Sequence[TensorReport]) -> float:
    return math.fsum(tensor.error.relative for tensor in tensors if tensor.error) / len(tensors)


def _mark(index: int) -> str:
    return _MARKS[(index + 3 * (index // 8)) % len(_MARKS)]  # so that colours that come again have other marks


def _svg(means: Mapping[str, Mapping[int, float]], layers: Sequence[int]) -> str:
    errors = [value for values in means.values() for value in values.values()]
    ticks = round_numbers(min(errors), max(errors))
    first, last, low, high = layers[0], layers[-1], ticks[0], ticks[-1]

    def x(layer: int) -> float:
        span = _WIDTH - _LEFT - _RIGHT - 24
        return _LEFT + 12 + (span * (layer - first) / (last - first) if last > first else span / 2)

    def y(error: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (error - low) / (high - low)

    drawn = []
    digits = max(0, math.ceil(-math.log10(100 * (ticks[1] - ticks[0])) - 1e-9))
    for tick in ticks:
        height = f"{y(tick):.1f}"
        drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height}" y2="{height}"/>')
        drawn.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{height}" dy="4" text-anchor="end">{100 * tick:.{digits}f} %</text>'
        )
    step = max(1, math.ceil(len(layers) / 24))
    for layer in layers[::step]:
        drawn.append(
            f'<text class="tick" x="{x(layer):.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{layer}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    drawn.append(f'<text class="axis" x="{middle:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">layer</text>')
    for index, (kind, values) in enumerate(means.items()):
        points = [(layer, values[layer]) for layer in sorted(values)]
        line = " ".join(f"{x(layer):.1f},{y(error):.1f}" for layer, error in points)
        marks = "\n".join(
            f'<path transform="translate({x(layer):.1f} {y(error):.1f})" d="{_mark(index)}">'
            f"<title>{escape(kind)}, layer {layer}: {percent(error)}</title></path>"
            for layer, error in points
        )
        drawn.append(f'<g class="series s{index % 8}">\n<polyline points="{line}"/>\n{marks}\n</g>')
    what = f"Relative error of {len(means)} kinds of module in layers {first} to {last}, between "
    label = f"{what}{percent(min(errors))} and {percent(max(errors))}; the numbers are in the table below"
    body = "\n".join(drawn)
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">\n{body}\n</svg>'
    )
