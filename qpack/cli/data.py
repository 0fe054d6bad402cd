"""``qpack data``: what the model would see of some training data."""

import json
from pathlib import Path

import click

import qpack
from qpack import terminal
from qpack.cli.options import DIRECTORY, verbosity
from qpack.data import FORMATS, LOSSES, ON_BAD_ROW, DataOptions


@click.command()
@click.argument("base", type=DIRECTORY)
@click.argument("data", nargs=-1, required=True)
@click.option(
    "--max-length", type=click.IntRange(2), default=1024, show_default=True, help="Longest sequence, in tokens."
)
@click.option("--format", type=click.Choice(FORMATS), help="Format of every row.  [default: told by its fields]")
@click.option("--loss", type=click.Choice(LOSSES), default="assistant", show_default=True, help="Tokens to learn.")
@click.option("--chat-template", type=click.Path(path_type=Path), help="Jinja file instead of the model's template.")
@click.option(
    "--on-bad-row", type=click.Choice(ON_BAD_ROW), default="fail", show_default=True, help="What a bad row does."
)
@click.option("--preferences", is_flag=True, help="The data is chosen and rejected answers.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Which rows a fractional weight draws.")
@click.option("--examples", type=click.IntRange(0), default=3, show_default=True, help="Sequences to show.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@verbosity
def data(
    base: Path,
    data: tuple[str, ...],
    max_length: int,
    format: str | None,
    loss: str,
    chat_template: Path | None,
    on_bad_row: str,
    preferences: bool,
    seed: int,
    examples: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show what the model BASE would see of DATA in training.

    The first sequences with the chat template applied and the learned tokens marked, lengths, what is cut, duplicates.
    DATA is a file, a directory or a data set of the hub, or several, as `qpack train` takes them.
    """
    from qpack.reports.data import print_survey

    options = DataOptions(format, loss, chat_template, on_bad_row)
    with terminal.progress("data", "rows", quiet=quiet) as on_progress:
        found = qpack.survey(
            base,
            data,
            options,
            max_length=max_length,
            preferences=preferences,
            seed=seed,
            examples=examples,
            on_progress=on_progress,
        )
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        print_survey(base, found, quiet=quiet)
