"""Options and types that several commands share."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from qpack import terminal
from qpack._core import BLOCKSIZES
from qpack.packing import MODES, QUANT_STORAGES, ConvertOptions
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


class NamedDirectory(click.ParamType[str]):
    """``NAME=DIR``."""

    name = "name=dir"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name, _, directory = str(value).partition("=")
        if not (name and directory):
            self.fail(f"{value!r}: expected NAME=DIR", param, ctx)
        return str(value)


def setting(flag: str, type: type, help: str) -> Callable[[Command], Command]:
    """An option for one of TrainSettings' fields; None, so not given, leaves the field to file or default."""
    from qpack.training import TrainSettings

    default = TrainSettings.__dataclass_fields__[flag.removeprefix("--").replace("-", "_")].default
    shown = "" if default is None else f"  [default: {default}]"
    return click.option(flag, type=type, help=help + shown)


def switch(flag: str, help: str) -> Callable[[Command], Command]:
    """An option for a field that is true or false."""
    return click.option(f"{flag}/--no-{flag.removeprefix('--')}", default=None, help=help)


def pattern(flag: str, help: str) -> Callable[[Command], Command]:
    """An option for a field that maps regular expressions to numbers."""

    def parse(context: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, int] | None:
        pairs = [value.rpartition("=") for value in values]
        for regex, _, number in pairs:
            if not regex or not number.isdigit():
                raise click.BadParameter(f"{regex}={number}: expected REGEX=NUMBER", context, param)
        return {regex: int(number) for regex, _, number in pairs} or None

    return click.option(flag, multiple=True, metavar="REGEX=NUMBER", callback=parse, help=help)


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

_PACKING = (
    click.option(
        "--mode",
        type=click.Choice(MODES),
        default="exact",
        show_default=True,
        help="exact: codes and scales of bitsandbytes. best: the same format with less error.",
    ),
    click.option(
        "--blocksize", type=click.Choice(BLOCKSIZES), default=64, show_default=True, help="Weights per block scale."
    ),
    click.option("--double-quant/--no-double-quant", default=True, help="Store the block scales in 8 bits (default)."),
    click.option("--rules", type=click.Path(path_type=Path), metavar="FILE.toml", help="Rules for single tensors."),
    click.option("--target-bits", type=float, help="Bits a packed weight on average, spent where errors are largest."),
    click.option("--pack-lm-head", is_flag=True, help="Pack the output embedding too, which vLLM does not read."),
    click.option(
        "--quant-storage",
        type=click.Choice(QUANT_STORAGES),
        default="uint8",
        show_default=True,
        help="Element type that holds the codes; bfloat16 for FSDP, which vLLM does not read.",
    ),
)
PACKING = frozenset(field.name for field in fields(ConvertOptions)) - {"max_shard_size"}
"""The names of what `packing` adds."""


def packing(command: Command) -> Command:
    """Add the fields of `qpack.ConvertOptions`, by their names; the largest file's size is `max_shard_size`."""
    for option in reversed(_PACKING):
        command = option(command)
    return command
