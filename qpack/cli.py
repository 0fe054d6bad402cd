"""The ``qpack`` program. Commands parse, call one function, and print its report; nothing is decided here.

Reports go to stdout, progress and errors to stderr. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

import qpack
from qpack import terminal
from qpack._core import BLOCKSIZES
from qpack.conversion import MODES, QUANT_STORAGES
from qpack.errors import QpackError
from qpack.merging import DTYPES
from qpack.sizes import format_size, parse_size

_Command = TypeVar("_Command", bound=Callable[..., Any])

_DIRECTORY = click.Path(path_type=Path)


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _verbosity(command: _Command) -> _Command:
    """Add ``-v`` and ``-q``: what is logged, and whether progress is shown. The command gets ``quiet``."""

    def configure(context: click.Context, _param: click.Parameter, verbose: bool) -> None:
        terminal.configure_logging(verbose=verbose, quiet=context.params["quiet"])

    quiet = click.option("-q", "--quiet", is_flag=True, is_eager=True, help="Print errors and the report only.")
    verbose = click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=configure, help="Print more of what goes on."
    )
    return quiet(verbose(command))


_threads = click.option("--threads", type=click.IntRange(1), help="Threads to work with.  [default: all cores]")
_force = click.option("--force", is_flag=True, help="Replace the output if it exists.")
_max_shard_size = click.option(
    "--max-shard-size", type=_Size(), default="5GB", show_default=True, help="Largest weight file to write."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(qpack.__version__, prog_name="qpack")
def cli() -> None:
    """Take a Hugging Face checkpoint through its whole 4-bit life: pack, fine-tune, serve, merge."""


@cli.command()
@click.argument("src")
@click.argument("dst", type=_DIRECTORY)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default="exact",
    show_default=True,
    help="exact: codes and scales of bitsandbytes. best: the same format with less error.",
)
@click.option(
    "--blocksize", type=click.Choice(BLOCKSIZES), default=64, show_default=True, help="Weights per block scale."
)
@click.option("--double-quant/--no-double-quant", default=True, help="Store the block scales in 8 bits (default).")
@click.option("--rules", type=click.Path(path_type=Path), metavar="FILE.toml", help="Rules for single tensors.")
@click.option("--target-bits", type=float, help="Bits a packed weight on average, spent where the error is largest.")
@click.option("--pack-lm-head", is_flag=True, help="Pack the output embedding too, which vLLM does not read.")
@click.option(
    "--quant-storage",
    type=click.Choice(QUANT_STORAGES),
    default="uint8",
    show_default=True,
    help="Element type that holds the codes; bfloat16 for FSDP, which vLLM does not read.",
)
@click.option("--revision", help="Branch, tag or commit of a model of the hub.")
@click.option("--low-disk", is_flag=True, help="Fetch, pack and drop one shard of a hub model at a time.")
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights (.bin), tensors only.")
@_max_shard_size
@click.option("--dry-run", is_flag=True, help="Show what would be written and what it would fit; write nothing.")
@_threads
@_force
@_verbosity
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


def _setting(flag: str, type: type, help: str) -> Callable[[_Command], _Command]:
    """An option for one of TrainSettings' fields; None, so not given, leaves the field to file or default."""
    from qpack.training import TrainSettings

    default = TrainSettings.__dataclass_fields__[flag.removeprefix("--").replace("-", "_")].default
    shown = "" if default is None else f"  [default: {default}]"
    return click.option(flag, type=type, help=help + shown)


@cli.command()
@click.argument("base", type=_DIRECTORY)
@click.argument("data", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=_DIRECTORY, required=True, help="Adapter directory to write.")
@_setting("--r", int, "Rank of the LoRA factors.")
@_setting("--lora-alpha", int, "The adapter's output is scaled by lora-alpha / r.")
@_setting("--lora-dropout", float, "Dropout before the adapter.")
@_setting("--lr", float, "Peak learning rate.")
@_setting("--epochs", float, "Passes over the data.")
@_setting("--max-steps", int, "Optimizer steps, instead of epochs.")
@_setting("--batch-size", int, "Sequences in a forward pass.")
@_setting("--grad-accum", int, "Forward passes in an optimizer step.")
@_setting("--max-length", int, "Longest sequence, in tokens.")
@_setting("--optim", str, "Optimizer, by transformers' name.")
@_setting("--seed", int, "Seed of initial adapter, data order and dropout.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of settings; flags take precedence.")
@_force
@_verbosity
def train(base: Path, data: Path, output: Path, config: Path | None, force: bool, quiet: bool, **flags: Any) -> None:
    """Train a LoRA adapter for the packed model BASE on the conversations in the JSONL file DATA."""
    from qpack.training import TrainSettings, load_settings

    given = {name: value for name, value in flags.items() if value is not None}
    settings = load_settings(config, **given) if config else TrainSettings(**given)
    with terminal.progress("train", "steps", quiet=quiet) as on_progress:
        report = qpack.train(base, data, output, settings, force=force, on_progress=on_progress)
    loss = f"loss {report.first_loss:.3f} to {report.final_loss:.3f}"
    work = f"{report.steps} steps, {report.tokens} tokens at {report.tokens_per_second:.0f}/s"
    how = f"{report.optimizer}, {report.compute_dtype}"
    cut = f", {report.truncated} of {report.examples} examples cut at max-length" if report.truncated else ""
    click.echo(f"{output}: {loss}, {work} ({how}){cut}, in {report.seconds:.1f} s")


@cli.command()
@click.argument("base", type=_DIRECTORY)
@click.option("--adapter", "pairs", metavar="NAME=DIR", multiple=True, help="Adapter to serve as NAME; repeatable.")
@click.option("--adapters", "folder", type=_DIRECTORY, help="Directory whose subdirectories are adapters.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 takes a free one."
)
@click.option("--max-loras", type=click.IntRange(1), help="Adapters in one batch.  [default: all]")
@click.option("--max-lora-rank", type=int, help="Largest rank of an adapter.  [default: the adapters' largest]")
@click.option("--max-model-len", type=click.IntRange(1), help="Longest prompt and answer, in tokens.")
@_verbosity
def serve(pairs: tuple[str, ...], folder: Path | None, quiet: bool, **options: Any) -> None:
    """Answer an OpenAI-compatible API with the packed model BASE and its adapters."""
    from serve import ServeConfig, collect_adapters
    from serve import serve as run

    run(ServeConfig(adapters=collect_adapters(pairs, folder), verbose=terminal.verbose(), **options))


@cli.command()
@click.argument("base", type=_DIRECTORY)
@click.argument("adapter", type=_DIRECTORY)
@click.argument("dst", type=_DIRECTORY)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="bfloat16",
    show_default=True,
    help="Element type of the merged weights.",
)
@_max_shard_size
@_threads
@_force
@_verbosity
def merge(base: Path, adapter: Path, dst: Path, quiet: bool, **options: Any) -> None:
    """Merge ADAPTER into the model BASE, unpacked, and write a plain checkpoint to DST."""
    with terminal.progress("merge", "bytes", quiet=quiet) as on_progress:
        report = qpack.merge(base, adapter, dst, on_progress=on_progress, **options)
    size = f"{format_size(report.result.bytes)} in {len(report.result.files)} files"
    click.echo(f"{dst}: {report.merged} weights merged, {size}, in {report.seconds:.1f} s")


@cli.command()
@click.argument("directory", type=_DIRECTORY)
@click.option("--against", metavar="SRC", type=_DIRECTORY, help="The model it was packed from, to compare with.")
@_threads
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_verbosity
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


@cli.command()
@click.argument("directory", type=_DIRECTORY)
@click.option("--tensor", metavar="NAME", help="Show one weight in detail.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path), help="Write a page to FILE instead.")
@_force
@_verbosity
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


@cli.command()
@click.option("--model", metavar="ID_OR_DIR", help="Model to run on.  [default: SmolLM2-135M-Instruct from PyPI]")
@click.option(
    "-o", "--output", type=_DIRECTORY, default="demo-run", show_default=True, help="Directory for all that it writes."
)
@_verbosity
def demo(model: str | None, output: Path, quiet: bool) -> None:
    """Run the whole main job on a real model: convert, train two adapters, serve them, merge one."""
    from qpack.demo import run

    report = run(output, model=model, quiet=quiet)
    click.echo(report.table())
    if report.failures:
        raise QpackError("; ".join(report.failures))


def main() -> None:
    """Run the program and exit with its status."""
    try:
        status = cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except QpackError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed: this command needs qpack with the extra cpu or cuda (demo: and demo)")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(1)
