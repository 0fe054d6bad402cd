"""``qpack verify``: whether a checkpoint is what was packed."""

import json
from dataclasses import asdict
from pathlib import Path

import click

import qpack
from qpack import terminal
from qpack.cli.options import DIRECTORY, threads, verbosity


@click.command()
@click.argument("directory", type=DIRECTORY)
@click.option("--against", metavar="SRC", type=DIRECTORY, help="The model it was packed from, to compare with.")
@threads
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@verbosity
def verify(directory: Path, against: Path | None, threads: int | None, as_json: bool, quiet: bool) -> int:
    """Check that the checkpoint in DIRECTORY is what was packed, to the last bit.

    Prints every problem, and exits with status 1 if there is one.
    """
    with terminal.progress("verify", "bytes", quiet=quiet) as on_progress:
        found = qpack.verify(directory, against=against, threads=threads, on_progress=on_progress)
    if as_json:
        shown = {"directory": str(found.directory), "against": found.against and str(found.against), "ok": found.ok}
        click.echo(json.dumps(asdict(found) | shown, indent=2))
        return 0 if found.ok else 1
    for problem in found.problems:
        click.echo(f"{directory}/{problem}")
    click.echo(f"{directory}: {found.summary()}")
    return 0 if found.ok else 1
