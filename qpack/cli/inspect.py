"""``qpack inspect``: what a checkpoint holds."""

import json
from pathlib import Path

import click

import qpack
from qpack.cli.options import DIRECTORY, force, verbosity


@click.command()
@click.argument("directory", type=DIRECTORY)
@click.option("--tensor", metavar="NAME", help="Show one weight in detail.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path), help="Write a page to FILE instead.")
@force
@verbosity
def inspect(directory: Path, tensor: str | None, as_json: bool, html: Path | None, force: bool, quiet: bool) -> None:
    """Show what the packed or plain checkpoint in DIRECTORY holds."""
    from qpack.inspection import examine
    from qpack.reports import page, text

    if html is not None and (tensor or as_json):
        raise click.UsageError("--html shows the whole checkpoint, so it goes with neither --tensor nor --json")
    if tensor is not None:
        found = examine(directory, tensor)
        click.echo(json.dumps(found.as_json(), indent=2)) if as_json else text.print_examination(found)
        return
    inspection = qpack.inspect(directory)
    if html is not None:
        page.write(inspection, html, force=force)
        click.echo(f"{html}: {len(inspection.tensors)} tensors of {directory}")
    elif as_json:
        click.echo(json.dumps(inspection.as_json(), indent=2))
    else:
        text.print_inspection(inspection, quiet=quiet)
