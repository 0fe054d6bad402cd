"""``qpack demo``: the whole main job on a real model."""

from pathlib import Path

import click

from qpack.cli.options import DIRECTORY, verbosity
from qpack.errors import QpackError


@click.command()
@click.option("--model", metavar="ID_OR_DIR", help="Model to run on.  [default: SmolLM2-135M-Instruct from PyPI]")
@click.option(
    "-o", "--output", type=DIRECTORY, default="demo-run", show_default=True, help="Directory for all that it writes."
)
@verbosity
def demo(model: str | None, output: Path, quiet: bool) -> None:
    """Run the whole main job on a real model: convert, train two adapters, serve them, merge one."""
    from qpack.demo import run

    report = run(output, model=model, quiet=quiet)
    click.echo(report.table())
    if report.failures:
        raise QpackError("; ".join(report.failures))
