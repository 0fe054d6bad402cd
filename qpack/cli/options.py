"""Options and types that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from qpack import terminal
from qpack.sizes import parse_size

Command = TypeVar("Command", bound=Callable[..., Any])

DIRECTORY = click.Path(path_type=Path)


class Size(click.ParamType[int]):
    """A number of bytes, ``5GB`` or ``500MiB`` too."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def setting(flag: str, type: type, help: str) -> Callable[[Command], Command]:
    """An option for one of TrainSettings' fields; None, so not given, leaves the field to file or default."""
    from qpack.training import TrainSettings

    default = TrainSettings.__dataclass_fields__[flag.removeprefix("--").replace("-", "_")].default
    shown = "" if default is None else f"  [default: {default}]"
    return click.option(flag, type=type, help=help + shown)


def verbosity(command: Command) -> Command:
    """Add ``-v`` and ``-q``: what is logged, and whether progress is shown. The command gets ``quiet``."""

    def configure(context: click.Context, _param: click.Parameter, verbose: bool) -> None:
        terminal.configure_logging(verbose=verbose, quiet=context.params["quiet"])

    quiet = click.option("-q", "--quiet", is_flag=True, is_eager=True, help="Print errors and the report only.")
    verbose = click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=configure, help="Print more of what goes on."
    )
    return quiet(verbose(command))


threads = click.option("--threads", type=click.IntRange(1), help="Threads to work with.  [default: all cores]")
force = click.option("--force", is_flag=True, help="Replace the output if it exists.")
max_shard_size = click.option(
    "--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest weight file to write."
)
