"""An inspection as text: a table by kind of module on a terminal or in a pipe, and one weight in detail.

On a terminal, bold and dim; in a pipe plain lines, as wide as the longest name needs.
"""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qpack.inspection import Examination, Inspection, Kind, TensorReport
from qpack.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

LEVELS = (
    "-1.0000", "-0.6962", "-0.5251", "-0.3949", "-0.2844", "-0.1848", "-0.0911", "0.0000",
    "0.0796", "0.1609", "0.2461", "0.3379", "0.4407", "0.5626", "0.7230", "1.0000",
)  # fmt: skip
"""The NF4 levels, to four digits."""


def summary(inspection: Inspection) -> dict[str, str]:
    """What stands above the table: a label and a value a line."""
    size = f"{format_size(inspection.bytes)} in {len(inspection.files)} file{'s' if len(inspection.files) > 1 else ''}"
    lines = {"model": inspection.model_type, "size": size}
    packed = len(inspection.packed)
    lines["weights"] = f"{inspection.weights:,}, {inspection.bits:.3f} bits each"
    if packed:
        lines["packed"] = f"{packed} of {len(inspection.tensors)} tensors, {inspection.packed_bits:.3f} bits a weight"
    if inspection.error is not None:
        lines["error"] = f"{percent(inspection.error)} on average (norm of the difference over that of the weight)"
    if made := inspection.manifest:
        source = made.source
        at = f" at {source['revision']}" if source.get("revision") else ""
        lines["source"] = f"{source.get('name', 'unnamed')}{at}, {format_size(int(source.get('bytes', 0)))}"
        options = ", ".join(f"{key.replace('_', ' ')} {_option(value)}" for key, value in made.options.items())
        lines["options"] = f"{options} (qpack {made.version})"
        lines["fingerprint"] = made.fingerprint
    return lines


HEADINGS = ("kind", "count", "shape", "stored as", "weights", "size", "bits", "error", "worst")
"""Columns of the table by kind; the last two only where errors are known."""


def row(kind: Kind) -> tuple[str, ...]:
    """One line of the table by kind."""
    shapes = kind.shapes
    more = f" +{len(shapes) - 2}" if len(shapes) > 2 else ""
    worst = f"{percent(kind.worst.error.relative)} {place(kind.worst)}" if kind.worst and kind.worst.error else ""
    return (
        kind.name,
        str(len(kind.tensors)),
        ", ".join(shape_text(shape) for shape in shapes[:2]) + more,
        stored_as(kind),
        f"{kind.weights:,}",
        format_size(kind.bytes),
        f"{kind.bits:.3f}",
        "" if kind.error is None else percent(kind.error),
        worst,
    )


def total(inspection: Inspection) -> tuple[str, ...]:
    """The last line of the table by kind."""
    error = "" if inspection.error is None else percent(inspection.error)
    size, bits = format_size(inspection.bytes), f"{inspection.bits:.3f}"
    return ("in all", str(len(inspection.tensors)), "", "", f"{inspection.weights:,}", size, bits, error, "")


def print_inspection(inspection: Inspection, *, quiet: bool) -> None:
    """Print summary and table; the summary alone with ``quiet``."""
    console = _console()
    console.print(f"[bold]{_escape(str(inspection.directory))}[/bold]")
    console.print(_pairs(summary(inspection)))
    if quiet:
        return
    columns = len(HEADINGS) if inspection.error is not None else len(HEADINGS) - 2
    table = _table()
    for index, heading in enumerate(HEADINGS[:columns]):
        table.add_column(heading, justify="left" if index in (0, 2, 3, 8) else "right", no_wrap=True)
    for kind in inspection.by_kind():
        table.add_row(*map(_escape, row(kind)[:columns]))
    table.add_section()
    table.add_row(*total(inspection)[:columns], style="bold")
    console.print()
    _print(console, table)


def print_examination(found: Examination) -> None:
    """Print one weight in detail."""
    console = _console()
    weight = found.weight
    console.print(f"[bold]{_escape(weight.name)}[/bold]")
    lines = {"shape": shape_text(weight.shape), "stored as": stored_as(weight)}
    lines["size"] = f"{format_size(weight.bytes)}, {weight.bits:.3f} bits a weight"
    if found.state is not None:
        lines["quant state"] = ", ".join(
            f"{key.replace('_', ' ')} {_option(value)}" for key, value in found.state.items()
        )
    if found.scales is not None:
        values = {key: value for key, value in found.scales.items() if key != "negative"}
        lines["scales"] = ", ".join(f"{key} {value:.6g}" for key, value in values.items())
        lines["scales"] += f", {found.scales['negative']} negative"
    if (error := weight.error) is not None:
        lines["error"] = f"{percent(error.relative)}, worst block {percent(error.worst)} (number {error.worst_block})"
    if weight.reason:
        lines["kept"] = weight.reason
    console.print(_pairs(lines))
    table = _table("tensor", "file", "stored as", "bytes", "digest")
    for part in found.stored:
        how = f"{part.dtype} {shape_text(part.shape)}"
        table.add_row(*map(_escape, (part.name, part.file, how, f"{part.bytes:,}", part.digest or "not recorded")))
    console.print()
    _print(console, table)
    if found.codes is not None:
        console.print()
        _print(console, _levels(found.codes))


def _levels(codes: tuple[int, ...]) -> "Table":
    table = _table("code", "level", "weights", "share", "")
    for code, (level, count) in enumerate(zip(LEVELS, codes, strict=True)):
        bar = "█" * round(40 * count / max(codes))
        table.add_row(str(code), f"{level:>7}", f"{count:,}", percent(count / max(sum(codes), 1)), bar)
    for column in table.columns[:4]:
        column.justify = "right"
    return table


def percent(share: float) -> str:
    """A share in percent, with three digits or more."""
    return f"{100 * share:.2f} %"


def shape_text(shape: Iterable[int]) -> str:
    """A shape as people write it: 512 x 256; a scalar has none."""
    return " x ".join(map(str, shape)) or "scalar"


def stored_as(stored: Kind | TensorReport) -> str:
    """How a weight is stored: ``NF4, blocks of 64, scales in 8 bits``."""
    if stored.blocksize is None:
        return stored.dtype
    return f"{stored.dtype}/{stored.blocksize}{' nested' if stored.double_quant else ''}"


def place(tensor: TensorReport) -> str:
    """Where a weight is, short: ``layer 3``, or its name."""
    if tensor.layer is None:
        return tensor.name
    expert = next(
        (
            word
            for word, before in zip(tensor.name.split(".")[1:], tensor.name.split("."), strict=False)
            if before == "experts" and word.isdigit()
        ),
        None,
    )
    return f"layer {tensor.layer}" + (f" expert {expert}" if expert else "")


def _option(value: Any) -> str:
    return (
        {True: "on", False: "off", None: "none"}.get(value, str(value))
        if isinstance(value, bool | None)
        else str(value)
    )


def _console() -> "Console":
    from rich.console import Console

    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, no_color=True, width=1000)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _table(*headings: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _pairs(lines: dict[str, str]) -> "Table":
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in lines.items():
        grid.add_row(label, _escape(value))
    return grid


def _print(console: "Console", table: "RenderableType") -> None:
    console.print(table)
