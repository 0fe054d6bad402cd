"""What commands print of checkpoints: a table by kind of module, one weight in detail, what was or would be packed.

On a terminal, bold and dim; in a pipe plain lines, as wide as the longest name needs.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qpack import estimate
from qpack._core import LEVELS
from qpack.conversion import ConvertReport, DryRun
from qpack.errors import CheckpointError
from qpack.inspection import Examination, Inspection, Kind, TensorReport, expert_of, layer_of
from qpack.merging.effects import Effect, by_kind
from qpack.merging.merging import MergeReport
from qpack.sizes import format_size
from qpack.training.settings import TrainSettings


def summary(inspection: Inspection) -> dict[str, str]:
    """What stands above the table: a label and a value a line."""
    size = f"{format_size(inspection.bytes)} in {len(inspection.files)} file{'s' if len(inspection.files) > 1 else ''}"
    lines = {"model": inspection.model_type, "size": size}
    packed = len(inspection.packed)
    lines["weights"] = f"{inspection.weights:,}, {inspection.bits:.3f} bits each"
    if packed:
        lines["packed"] = f"{packed} of {len(inspection.tensors)} tensors, {inspection.packed_bits:.3f} bits a weight"
    if inspection.error is not None:
        lines["error"] = f"{percent(inspection.error)} of the norm of the packed weights"
    if made := inspection.manifest:
        source = made.source
        at = f" at {source['revision']}" if source.get("revision") else ""
        lines["source"] = f"{source.get('name', 'unnamed')}{at}, {format_size(int(source.get('bytes', 0)))}"
        lines["options"] = f"{_options(made.options)} (qpack {made.version})"
        lines["fingerprint"] = made.fingerprint
    return lines


HEADINGS = ("kind", "count", "shape", "stored as", "weights", "size", "bits", "error", "worst")
"""Columns of the table by kind; the last two only where errors are known."""

NUMERIC = frozenset({"count", "weights", "size", "bits", "error"})
"""Columns whose cells are flush right."""


def row(kind: Kind) -> tuple[str, ...]:
    """One line of the table by kind."""
    shapes = kind.shapes
    more = f" +{len(shapes) - 2}" if len(shapes) > 2 else ""
    worst = f"{percent(kind.worst.error.relative)} {place(kind.worst.name)}" if kind.worst and kind.worst.error else ""
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


_DISPENSABLE = ("weights", "worst", "shape", "count")
"""Columns to leave out, one after the other, until the table fits a narrow terminal."""


_UNLIMITED = 10_000
"""Columns of a line where nothing limits them."""


def print_inspection(inspection: Inspection, *, quiet: bool) -> None:
    """Print summary and table; the summary alone with ``quiet``."""
    parts: list[Text | Table] = [Text(str(inspection.directory), style="bold"), _pairs(summary(inspection))]
    if not quiet:
        parts += [Text(), _kinds(inspection, _console())]
    _show(parts)


def print_examination(found: Examination) -> None:
    """Print one weight in detail."""
    weight = found.weight
    lines = {"shape": shape_text(weight.shape), "stored as": stored_as(weight)}
    lines["size"] = f"{format_size(weight.bytes)}, {weight.bits:.3f} bits a weight"
    if found.state is not None:
        lines["quant state"] = _options(found.state)
    if found.scales is not None:
        lines["scales"] = ", ".join(f"{key} {value:.6g}" for key, value in found.scales.items())
    if (error := weight.error) is not None:
        lines["error"] = f"{percent(error.relative)}, worst block {percent(error.worst)} (number {error.worst_block})"
    if weight.reason:
        lines["kept"] = weight.reason
    table = _table("tensor", "file", "stored as", "bytes", "digest", wrap=True)
    for part in found.stored:
        how = f"{part.dtype} {shape_text(part.shape)}"
        table.add_row(*map(Text, (part.name, part.file, how, f"{part.bytes:,}", part.digest or "not recorded")))
    parts: list[Text | Table] = [Text(weight.name, style="bold"), _pairs(lines), Text(), table]
    if found.codes is not None:
        parts += [Text(), _levels(found.codes)]
    _show(parts)


def print_conversion(destination: Path, report: ConvertReport) -> None:
    """Print what was packed, at which size and error, and what was kept and why."""
    result = report.result
    size = f"{format_size(report.source_bytes)} to {format_size(result.bytes)}"
    bits = f"{result.packed_bits:.3f} bits a packed weight, {result.bits:.3f} over all"
    resumed = f", {format_size(report.resumed_bytes)} of it done before" if report.resumed_bytes else ""
    lines = {"packed": f"{len(result.packed)} weights, {size}{resumed}, in {report.seconds:.1f} s", "bits": bits}
    if result.error is not None:
        worst = max(result.packed, key=lambda weight: weight.error.relative if weight.error else 0.0)
        lines["error"] = (
            f"{percent(result.error)}, worst {percent(worst.error.relative)} in {worst.name}" if worst.error else ""
        )
    lines |= _kept((tensor.reason or "", tensor.bytes) for tensor in result.tensors if tensor.blocksize is None)
    lines |= _foreign(report.foreign)
    _show([Text(str(destination), style="bold"), _pairs(lines)])


def _foreign(what: Sequence[str]) -> dict[str, str]:
    shown = f"stock transformers cannot load {', '.join(what)} in 4 bits; qpack.load can"
    return {"note": shown} if what else {}


def print_dry_run(destination: Path, dry: DryRun) -> None:
    """Print what would be written, how long it would take, and what it would fit."""
    parts = [part for recipe in dry.plan.recipes for part in recipe.parts]
    packed = [part for part in parts if part.packing]
    files = f"{len(dry.files)} file{'s' if len(dry.files) > 1 else ''}"
    bits = 8 * dry.bytes / sum(part.weights for part in parts)
    lines = {
        "would pack": f"{len(packed)} weights, {format_size(dry.source_bytes)} to {format_size(dry.bytes)} in {files}",
        "bits": f"{dry.packed_bits:.3f} a packed weight, {bits:.3f} over all",
    }
    lines |= _kept((part.reason, 0) for part in parts if not part.packing)
    if dry.seconds is not None and dry.read_rate is not None:
        lines["time"] = f"about {dry.seconds:.0f} s, at {format_size(dry.read_rate)}/s as the source was read just now"
    room = f"{format_size(dry.free_bytes)} free for {format_size(dry.bytes)}"
    if dry.scratch_bytes:
        room += f" and {format_size(dry.scratch_bytes)} of shards meanwhile"
    lines["disk"] = room if dry.fits_disk else f"NO ROOM: {room}"
    try:
        kept = {part.name: part.shape for part in parts if not part.packing}
        in_16_bits = 2 * sum(part.weights for part in parts if not part.packing)
        model = estimate.Model.of(dry.config, dry.plan.packed, dry.bytes - in_16_bits, kept)
    except CheckpointError as error:
        lines["GPU"] = str(error)
    else:
        lines["serving"] = str(estimate.serving(model)).partition(": ")[2]
        lines["training"] = str(estimate.training(model)).partition(": ")[2]
    _show([Text(f"{destination} (dry run, nothing is written)", style="bold"), _pairs(lines)])


def print_merge(destination: Path, report: MergeReport) -> None:
    """Print what was merged, and by kind of weight how the change compares with the error of quantization."""
    effects, result = report.effects, report.result
    size = f"{format_size(result.bytes)} in {len(result.files)} file{'s' if len(result.files) > 1 else ''}"
    resumed = f", {format_size(report.resumed_bytes)} of the source done before" if report.resumed_bytes else ""
    lines = {"merged": f"{report.merged} weights, {size}{resumed}, in {report.seconds:.1f} s"}
    if result.packed:
        lines["bits"] = f"{result.packed_bits:.3f} bits a packed weight, {result.bits:.3f} over all"
    lines |= _foreign(report.foreign)
    if (check := report.check) is not None:
        worst = f"at most {check.worst:.2g} at one"
        lines["check"] = f"KL {check.kl:.2g} a token from the base with its adapters, {worst} of {check.tokens}"
        if check.rounding is not None:
            lines["rounding"] = f"KL {check.rounding:.2g} a token if the base's weights are rounded as the result's are"
    if effects and report.errors_of is None:
        lines["error"] = "not recorded: the base was not packed by qpack"
    small = sum(effect.is_small for effect in effects.values())
    if small:
        lines["warning"] = f"in {small} of {len(effects)} weights {_SMALL[report.errors_of or '']}"
    parts: list[Text | Table] = [Text(str(destination), style="bold"), _pairs(lines)]
    if effects:
        parts += [Text(), _effects(effects)]
    _show(parts)


_SMALL = {
    "base": "the packed base and its original differ by more than the adapters change",
    "result": "packing changes more than the adapters do",
}
"""What a change that is smaller than the error means, by whose error it is."""


def _effects(effects: Mapping[str, Effect]) -> Table:
    table = _table("kind", "count", "change", "of weight", "error", "ratio", "smallest")
    for column in table.columns[1:-1]:
        column.justify = "right"
    for kind, found in by_kind(effects).items():
        known = {name: effect.ratio for name, effect in found.items() if effect.ratio is not None}
        least = min(known, key=lambda name: known[name], default=None)
        smallest = f"{known[least]:.3f} {place(least)}" if least else ""
        table.add_row(kind, str(len(found)), *_norms(Effect.of_all(list(found.values()))), smallest)
    table.add_section()
    table.add_row("in all", str(len(effects)), *_norms(Effect.of_all(list(effects.values()))), "", style="bold")
    return table


def _norms(effect: Effect) -> tuple[str, ...]:
    """Cells: norm of the change, its share of the weight's, norm of the error, change over error."""
    return (
        f"{effect.change:.4g}",
        percent(effect.change / effect.weight) if effect.weight else "",
        "" if effect.error is None else f"{effect.error:.4g}",
        "" if effect.ratio is None else f"{effect.ratio:.3f}",
    )


def print_estimate(base: Path, found: estimate.Fit, settings: TrainSettings) -> None:
    """Print what training needs by part, whether it fits, how far it could go, and what to change where it does not."""
    need, device = found.need, found.device
    lines = {name: format_size(size) for name, size in need.parts.items()}
    paged = f", {format_size(need.pageable)} of it can be paged out" if need.pageable else ""
    lines["in all"] = format_size(need.bytes) + paged
    lines["fits"] = f"{'yes' if found.fits else 'NO'}: {format_size(device.bytes)}, {device.name}"
    if not found.fits:
        lines["nearest"] = found.advice
    if found.longest:
        lines["longest"] = f"--max-length {found.longest} at --batch-size {settings.batch_size}"
    if found.largest:
        lines["largest"] = f"--batch-size {found.largest} at --max-length {settings.max_length}"
    _show([Text(f"{base}: {need.purpose}", style="bold"), _pairs(lines)])


def _kept(reasons: Iterable[tuple[str, int]]) -> dict[str, str]:
    """What is not packed: how many tensors for each reason, and their bytes where those are known."""
    count, size = Counter[str](), Counter[str]()
    for reason, nbytes in reasons:
        count[reason] += 1
        size[reason] += nbytes
    groups = [
        f"{number} x {reason}" + (f" ({format_size(size[reason])})" if size[reason] else "")
        for reason, number in count.most_common()
    ]
    return {"kept": ", ".join(groups)} if groups else {}


def percent(share: float) -> str:
    """A share in percent, to two decimals."""
    return f"{100 * share:.2f} %"


def shape_text(shape: Iterable[int]) -> str:
    """A shape as people write it: 512 x 256."""
    return " x ".join(map(str, shape)) or "scalar"


def stored_as(stored: Kind | TensorReport) -> str:
    """How a weight is stored: ``BF16``, ``NF4/64`` in blocks of 64, ``NF4/64 nested`` with its scales in 8 bits."""
    if stored.blocksize is None:
        return stored.dtype
    return f"{stored.dtype}/{stored.blocksize}{' nested' if stored.double_quant else ''}"


def place(name: str) -> str:
    """Where the weight ``name`` is, in short: ``layer 3``, ``layer 3 expert 7``, or its name."""
    layer, expert = layer_of(name), expert_of(name)
    if layer is None:
        return name
    return f"layer {layer}" + ("" if expert is None else f" expert {expert}")


def _options(values: Mapping[str, Any]) -> str:
    words = {"True": "on", "False": "off", "None": "none"}
    return ", ".join(f"{key.replace('_', ' ')} {words.get(str(value), value)}" for key, value in values.items())


def _kinds(inspection: Inspection, console: Console) -> Table:
    """The table by kind, without some columns where the terminal is too narrow for all."""
    headings = list(HEADINGS if inspection.error is not None else HEADINGS[:-2])
    unlimited = console.options.update(width=_UNLIMITED)
    for heading in _DISPENSABLE:
        table = _kinds_of(inspection, headings)
        if console.measure(table, options=unlimited).maximum <= console.width:
            return table
        headings = [other for other in headings if other != heading]
    return _kinds_of(inspection, headings)


def _kinds_of(inspection: Inspection, headings: Sequence[str]) -> Table:
    table = _table(*headings)
    for column in table.columns:
        column.justify = "right" if column.header in NUMERIC else "left"

    def chosen(cells: Sequence[str]) -> list[Text]:
        return [Text(cell) for heading, cell in zip(HEADINGS, cells, strict=True) if heading in headings]

    for kind in inspection.by_kind():
        table.add_row(*chosen(row(kind)))
    table.add_section()
    table.add_row(*chosen(total(inspection)), style="bold")
    return table


def _levels(codes: Sequence[int]) -> Table:
    table = _table("code", "level", "weights", "share", "")
    for code, (level, count) in enumerate(zip(LEVELS, codes, strict=True)):
        bar = "█" * round(40 * count / max(codes))
        table.add_row(str(code), f"{level:.4f}", f"{count:,}", percent(count / sum(codes)), bar)
    for column in table.columns[:4]:
        column.justify = "right"
    return table


def _console() -> Console:
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, color_system=None, force_terminal=False, width=_UNLIMITED)


def _show(parts: Iterable[Text | Table]) -> None:
    console = _console()
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    for line in captured.get().splitlines():
        print(line.rstrip())


def _table(*headings: str, wrap: bool = False) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=not wrap, overflow="fold" if wrap else "ellipsis")
    return table


def _pairs(lines: Mapping[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in lines.items():
        grid.add_row(label, Text(value))
    return grid
