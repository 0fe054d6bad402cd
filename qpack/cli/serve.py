"""``qpack serve``: an OpenAI-compatible API over a base and its adapters."""

from pathlib import Path
from typing import Any

import click

from qpack import terminal
from qpack.cli.options import DIRECTORY, verbosity


@click.command()
@click.argument("base", type=DIRECTORY)
@click.option("--adapter", "pairs", metavar="NAME=DIR", multiple=True, help="Adapter to serve as NAME; repeatable.")
@click.option("--adapters", "folder", type=DIRECTORY, help="Directory whose subdirectories are adapters.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 takes a free one."
)
@click.option("--max-loras", type=click.IntRange(1), help="Adapters in one batch.  [default: all]")
@click.option("--max-lora-rank", type=int, help="Largest rank of an adapter.  [default: the adapters' largest]")
@click.option("--max-model-len", type=click.IntRange(1), help="Longest prompt and answer, in tokens.")
@click.option(
    "--drain-timeout", type=click.FloatRange(0), default=30, show_default=True, help="Seconds to end streams in."
)
@click.option("--force", is_flag=True, help="Serve adapters that were trained on another base, too.")
@verbosity
def serve(pairs: tuple[str, ...], folder: Path | None, quiet: bool, **options: Any) -> None:
    """Answer an OpenAI-compatible API with the packed model BASE and its adapters."""
    from serve import ServeConfig, collect_adapters
    from serve import serve as run

    run(ServeConfig(adapters=collect_adapters(pairs, folder), verbose=terminal.verbose(), **options))
