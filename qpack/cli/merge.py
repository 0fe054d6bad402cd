"""``qpack merge``: a checkpoint of a base and adapters, or one adapter of several."""

import json
import math
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

import qpack
from qpack import terminal
from qpack.adapters.combining import KINDS, SPARSE, Combination
from qpack.cli.options import DIRECTORY, PACKING, force, max_shard_size, packing, threads, verbosity
from qpack.merging.merging import DTYPES, TARGETS
from qpack.sizes import format_size


class WeightedAdapter(click.ParamType[tuple[Path, float]]):
    """A directory, or ``DIRECTORY:WEIGHT``."""

    name = "adapter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Path, float]:
        path, colon, weight = str(value).rpartition(":")
        if not colon or Path(value).is_dir():
            return Path(value), 1.0
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{weight!r} is no weight, expected ADAPTER or ADAPTER:WEIGHT", param, ctx)
        return Path(path), number


_MISPLACED = {
    "plain": PACKING,
    "nf4": {"dtype"},
    "adapter": PACKING
    | {"onto", "source", "dtype", "max_shard_size", "check", "max_kl", "dry_run", "threads", "as_json"},
}
"""The options that a kind of result has no use for."""


@click.command()
@click.argument("base", type=DIRECTORY)
@click.argument("adapters", metavar="ADAPTER[:WEIGHT]...", type=WeightedAdapter(), nargs=-1, required=True)
@click.argument("dst", type=DIRECTORY)
@click.option(
    "--onto",
    type=click.Choice(("packed", "original")),
    default="packed",
    show_default=True,
    help="packed: BASE, decoded, as the adapter was trained. original: what BASE was packed from.",
)
@click.option("--source", type=DIRECTORY, metavar="SRC", help="The original, for --onto original.")
@click.option(
    "--to",
    type=click.Choice((*TARGETS, "adapter")),
    default="plain",
    show_default=True,
    help="plain: a checkpoint without quantization. nf4: packed, from an original and the change. "
    "adapter: the ADAPTERs as one.",
)
@click.option(
    "--combine",
    type=click.Choice(KINDS),
    default="cat",
    show_default=True,
    help="How several adapters become one, by PEFT's names. cat: the sum of their changes.",
)
@click.option("--density", type=float, help=f"Share of the factors' values to keep, for {', '.join(SPARSE)}.")
@click.option("--seed", type=int, help="Of what the dare kinds keep.  [default: 0]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Element type of plain weights.  [default: bfloat16]")
@packing
@max_shard_size
@click.option(
    "--check",
    type=click.Path(path_type=Path),
    metavar="TEXT",
    help="A file of text on which the result must say what BASE says with its adapters, or nothing is kept.",
)
@click.option(
    "--max-kl",
    type=float,
    help="How far --check lets it diverge, in nats a token.  [default: of BASE 1e-4, or twice the rounding's]",
)
@click.option("--dry-run", is_flag=True, help="Show what would be written; write nothing.")
@threads
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object, weight by weight.")
@force
@verbosity
def merge(
    base: Path,
    adapters: tuple[tuple[Path, float], ...],
    dst: Path,
    onto: str,
    to: str,
    combine: str,
    density: float | None,
    seed: int | None,
    source: Path | None,
    check: Path | None,
    max_kl: float | None,
    dry_run: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge adapters into the model BASE and write a plain checkpoint to DST, with --to nf4 a packed one, or with
    --to adapter no model, but the adapters as one.

    Of several adapters the changes are added up, each times its weight; --combine has other ways. Interrupted, the same
    command goes on where it was. From --mode to --quant-storage, options are those of qpack convert, for --to nf4.
    """
    from qpack.reports import text

    context = click.get_current_context()
    given = {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if misplaced := sorted(given & _MISPLACED[to]):
        raise click.UsageError(f"--{misplaced[0].removeprefix('as_').replace('_', '-')} is not for --to {to}")
    if (onto == "original") != (source is not None):
        raise click.UsageError("--onto original and --source SRC need each other")
    if len(adapters) == 1 and combine != "cat":
        raise click.UsageError(f"--combine {combine} is of several adapters")
    if check is None and max_kl is not None:
        raise click.UsageError("--max-kl is for --check")
    if check is not None and dry_run:
        raise click.UsageError("--check compares what --dry-run does not write")
    try:
        combination = Combination(combine, density, seed)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if to == "adapter":
        made = qpack.combine(base, adapters, dst, combination, force=options["force"])
        click.echo(f"{dst}: rank {made.r}, {made.weights} weights, {format_size(made.bytes)}, in {made.seconds:.1f} s")
        return
    options = {name: value for name, value in options.items() if name in given or name not in PACKING}
    options |= {"combination": combination, "original": source, "to": to}
    if dry_run:
        plan = qpack.plan_merge(base, adapters, dst, **options)
        size = f"{format_size(plan.bytes)} in {len(plan.files)} files, {format_size(plan.free_bytes)} free"
        click.echo(f"{dst}: {plan.merged} tensors would change, {size}")
        return
    with terminal.progress("merge", "bytes", quiet=quiet) as on_progress:
        options |= {"check": check, "max_kl": max_kl}
        report = qpack.merge(base, adapters, dst, threads=threads, on_progress=on_progress, **options)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        text.print_merge(dst, report)
