"""``qpack merge``: a plain checkpoint of a base and an adapter."""

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

import qpack
from qpack import terminal
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
            return Path(path), float(weight)
        except ValueError:
            self.fail(f"{weight!r} is no weight, expected ADAPTER or ADAPTER:WEIGHT", param, ctx)


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
    type=click.Choice(TARGETS),
    default="plain",
    show_default=True,
    help="plain: a checkpoint without quantization. nf4: packed, from an original and the change.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Element type of plain weights.  [default: bfloat16]")
@packing
@max_shard_size
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
    source: Path | None,
    dry_run: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge adapters into the model BASE and write a plain checkpoint to DST, or with --to nf4 a packed one.

    Of several adapters the changes are added up, each times its weight. Interrupted, the same command goes on where it
    was. From --mode to --quant-storage, options are those of qpack convert, for --to nf4.
    """
    from qpack.reports import text

    if (onto == "original") != (source is not None):
        raise click.UsageError("--onto original and --source SRC need each other")
    source_of = click.get_current_context().get_parameter_source
    given = {name for name in options if source_of(name) is not ParameterSource.DEFAULT}
    if misplaced := sorted(given & ({"dtype"} if to == "nf4" else PACKING)):
        other = "plain" if to == "nf4" else "nf4"
        raise click.UsageError(f"--{misplaced[0].replace('_', '-')} is for --to {other}")
    options = {name: value for name, value in options.items() if name in given or name not in PACKING}
    if dry_run:
        plan = qpack.plan_merge(base, adapters, dst, original=source, to=to, **options)
        size = f"{format_size(plan.bytes)} in {len(plan.files)} files, {format_size(plan.free_bytes)} free"
        click.echo(f"{dst}: {plan.merged} tensors would change, {size}")
        return
    with terminal.progress("merge", "bytes", quiet=quiet) as on_progress:
        report = qpack.merge(
            base, adapters, dst, original=source, to=to, threads=threads, on_progress=on_progress, **options
        )
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        text.print_merge(dst, report)
