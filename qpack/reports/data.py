"""What ``qpack data`` prints: the first sequences as the model would see them, and the data in numbers.

What is learned is green on a terminal, and stands between ⟦ and ⟧ elsewhere.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from qpack.data.survey import Shown, Survey

_SKIPPED_SHOWN = 5
_BAR = 40


def print_survey(base: Path, found: Survey, *, quiet: bool) -> None:
    """Print it; the numbers alone with ``quiet``."""
    console = Console(highlight=False, soft_wrap=True)
    if not quiet:
        for shown in found.shown:
            console.print(Text(shown.origin, style="bold"))
            console.print(_text(shown, coloured=console.is_terminal), end="\n\n")
    lines = _lines(found)
    width = max(map(len, lines))
    console.print(Text(str(base), style="bold"))
    for label, value in lines.items():
        console.print(Text.assemble((f"{label:{width}}", "dim"), "  ", value))
    most = max(found.histogram.values())
    for top, count in found.histogram.items():
        bar = "█" * round(_BAR * count / most)
        console.print(Text(f"{f'<= {top}':>{width}}  {count:>8,} {bar}".rstrip()))
    sys.stdout.flush()


def _text(shown: Shown, *, coloured: bool) -> Text:
    if coloured:
        return Text.assemble(*((text, "green" if learned else "") for text, learned in shown.runs))
    return Text("".join(f"⟦{text}⟧" if learned else text for text, learned in shown.runs))


def _lines(found: Survey) -> dict[str, str]:
    """A label and a value a line; what is nothing is left out."""
    rows = ", ".join(f"{count:,} {name}" for name, count in found.rows.items())
    lines = {
        "rows": rows,
        "sequences": f"{found.sequences:,}",
        "tokens": f"{found.tokens:,}, {_share(found.learned, found.tokens)} learned",
        "lengths": f"median {found.median:g}, longest {found.longest:,}",
    }
    if found.truncated:
        lines["truncated"] = f"{_share(found.truncated, found.sequences)} at {found.max_length:,} tokens"
    if found.windows:
        lines["windows"] = f"{found.windows:,} of texts longer than {found.max_length:,} tokens"
    if found.packed:
        groups, fill = found.packed
        lines["packed"] = f"{groups:,} sequences of {found.max_length:,} tokens, {100 * fill:.1f} % filled"
    if found.duplicates:
        lines["duplicates"] = _share(found.duplicates, found.sequences)
    if found.empty:
        lines["empty"] = f"{found.empty:,} with nothing to learn but the end token"
    if found.openings:
        lacking = (f"{count:,} answers lack the {opening!r}" for opening, count in found.openings.items())
        lines["note"] = f"{', '.join(lacking)} with which the generation prompt ends"
    if found.left_out:
        lines["left out"] = ", ".join(f"{name} ({count:,} rows)" for name, count in found.left_out.items())
    if found.skipped:
        shown = found.skipped[:_SKIPPED_SHOWN]
        more = [f"and {len(found.skipped) - len(shown):,} more"] if len(found.skipped) > len(shown) else []
        lines["skipped"] = f"{len(found.skipped):,} rows: " + "; ".join([*shown, *more])
    return lines | {"digest": found.digest}


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole:.1f} %)"
