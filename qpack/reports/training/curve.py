"""The course of a value over the steps of a run, drawn as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from qpack.reports.page.axis import round_numbers

_WIDTH, _HEIGHT = 960, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 16, 48
_MOST = 400
"""Points of a line: of a longer run, each is the mean of several steps."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or single marks where there are few values."""

    name: str
    points: Sequence[tuple[int, float]]
    """Step and value, in order."""
    marked: bool = False


def figure(series: Sequence[Series], *, what: str) -> str:
    """A drawing of ``series``, with a legend if there are several. ``what`` names the value for who can't see it."""
    series = [one for one in series if one.points]
    legend = "\n".join(
        f'<li><i class="s{index}"></i><b>{escape(one.name)}</b> {one.points[-1][1]:.4g}</li>'
        for index, one in enumerate(series)
    )
    caption = f'\n<figcaption>\n<ul class="legend">\n{legend}\n</ul>\n</figcaption>' if len(series) > 1 else ""
    return f"""<figure>
<div class="scroll" role="region" aria-label="{escape(what)}, drawn" tabindex="0">
{_svg(series, what)}
</div>{caption}
</figure>"""


def _svg(series: Sequence[Series], what: str) -> str:
    values = [value for one in series for _, value in one.points]
    heights = round_numbers(min(values), max(values))
    last = max(one.points[-1][0] for one in series)

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - heights[0]) / (heights[-1] - heights[0])

    drawn = []
    for height in heights:
        at = f"{y(height):.1f}"
        drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        drawn.append(f'<text class="tick" x="{_LEFT - 8}" y="{at}" dy="4" text-anchor="end">{height:.4g}</text>')
    for step in {round(tick) for tick in round_numbers(0, last) if tick <= last}:
        drawn.append(
            f'<text class="tick" x="{x(step):.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{step}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    drawn.append(f'<text class="axis" x="{middle:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">step</text>')
    for index, one in enumerate(series):
        points = one.points if one.marked else _thinned(one.points)
        line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        marks = "".join(
            f'\n<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="4">'
            f"<title>{escape(one.name)}, step {step}: {value:.4g}</title></circle>"
            for step, value in points
            if one.marked or len(points) == 1
        )
        drawn.append(f'<g class="series s{index}">\n<polyline points="{line}"/>{marks}\n</g>')
    first = series[0].points
    label = f"{what} over {last} steps, from {first[0][1]:.4g} to {first[-1][1]:.4g}"
    body = "\n".join(drawn)
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">\n{body}\n</svg>'
    )


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means of as many neighbours as leave `_MOST` points."""
    size = -(-len(points) // _MOST)
    groups = [points[begin : begin + size] for begin in range(0, len(points), size)]
    return [(fmean(step for step, _ in group), fmean(value for _, value in group)) for group in groups]
