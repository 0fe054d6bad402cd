"""``qpack merge``: a plain checkpoint of a base and an adapter."""

from pathlib import Path
from typing import Any

import click

import qpack
from qpack import terminal
from qpack.cli.options import DIRECTORY, force, max_shard_size, threads, verbosity
from qpack.merging.merging import DTYPES
from qpack.sizes import format_size


@click.command()
@click.argument("base", type=DIRECTORY)
@click.argument("adapter", type=DIRECTORY)
@click.argument("dst", type=DIRECTORY)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="bfloat16",
    show_default=True,
    help="Element type of the merged weights.",
)
@max_shard_size
@threads
@force
@verbosity
def merge(base: Path, adapter: Path, dst: Path, quiet: bool, **options: Any) -> None:
    """Merge ADAPTER into the model BASE, unpacked, and write a plain checkpoint to DST."""
    with terminal.progress("merge", "bytes", quiet=quiet) as on_progress:
        report = qpack.merge(base, adapter, dst, on_progress=on_progress, **options)
    size = f"{format_size(report.result.bytes)} in {len(report.result.files)} files"
    click.echo(f"{dst}: {report.merged} weights merged, {size}, in {report.seconds:.1f} s")
