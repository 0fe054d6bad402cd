"""``qpack convert``: pack a checkpoint."""

from pathlib import Path
from typing import Any

import click

import qpack
from qpack import terminal
from qpack.cli.options import DIRECTORY, force, max_shard_size, packing, threads, verbosity


@click.command()
@click.argument("src")
@click.argument("dst", type=DIRECTORY)
@packing
@click.option("--revision", help="Branch, tag or commit of a model of the hub.")
@click.option("--low-disk", is_flag=True, help="Fetch, pack and drop one shard of a hub model at a time.")
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights (.bin), tensors only.")
@max_shard_size
@click.option("--dry-run", is_flag=True, help="Show what would be written and what it would fit; write nothing.")
@threads
@force
@verbosity
def convert(src: str, dst: Path, dry_run: bool, threads: int | None, force: bool, quiet: bool, **options: Any) -> None:
    """Pack the model SRC to NF4 and write it to DST.

    SRC is a directory, a safetensors file or index, or the id of a model of the Hugging Face hub. Interrupted, the same
    command goes on where it was.
    """
    from qpack.reports import text

    if dry_run:
        text.print_dry_run(dst, qpack.plan_conversion(src, dst, **options))
        return
    with terminal.progress("convert", "bytes", quiet=quiet) as on_progress:
        done = qpack.convert(src, dst, threads=threads, force=force, on_progress=on_progress, **options)
    text.print_conversion(dst, done)
