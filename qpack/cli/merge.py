"""``qpack merge``: a plain checkpoint of a base and an adapter."""

import json
from pathlib import Path
from typing import Any

import click

import qpack
from qpack import terminal
from qpack.cli.options import DIRECTORY, force, max_shard_size, threads, verbosity
from qpack.merging.merging import DTYPES
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
    "--dtype",
    type=click.Choice(DTYPES),
    default="bfloat16",
    show_default=True,
    help="Element type of the merged weights.",
)
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
    source: Path | None,
    dry_run: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge adapters into the model BASE, unpacked, and write a plain checkpoint to DST.

    Of several adapters the changes are added up, each times its weight. Interrupted, the same command goes on where it
    was.
    """
    from qpack.reports import text

    if (onto == "original") != (source is not None):
        raise click.UsageError("--onto original and --source SRC need each other")
    if dry_run:
        plan = qpack.plan_merge(base, adapters, dst, original=source, **options)
        size = f"{format_size(plan.bytes)} in {len(plan.files)} files, {format_size(plan.free_bytes)} free"
        click.echo(f"{dst}: {plan.merged} tensors would change, {size}")
        return
    with terminal.progress("merge", "bytes", quiet=quiet) as on_progress:
        report = qpack.merge(base, adapters, dst, original=source, threads=threads, on_progress=on_progress, **options)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        text.print_merge(dst, report)
