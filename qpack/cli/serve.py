"""``qpack serve``: an OpenAI-compatible API over a base and its adapters."""

from typing import Any

import click

from qpack import terminal
from qpack.cli.config_file import config_file
from qpack.cli.limits import request_limits
from qpack.cli.options import DIRECTORY, NamedDirectory, verbosity
from qpack.reports import serving


@click.command()
@click.argument("base", type=DIRECTORY)
@config_file
@click.option("--check", is_flag=True, help="Start nothing: check all of this and print what would be served.")
@click.option("--adapter", "pairs", type=NamedDirectory(), multiple=True, help="Adapter to serve as NAME; repeatable.")
@click.option("--adapters", "watch", type=DIRECTORY, help="Directory of adapters, which may come and go.")
@click.option("--registry", type=DIRECTORY, help="Directory to keep adapters and API keys in.  [default: none is kept]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 takes a free one."
)
@click.option("--without-keys", is_flag=True, help="Let other machines in without an API key.")
@click.option("--max-loras", type=click.IntRange(1), help="Adapters in one batch.  [default: all, from 4 to 16]")
@click.option("--max-cpu-loras", type=click.IntRange(1), help="Adapters in memory.  [default: all, at least 16]")
@click.option("--max-lora-rank", type=int, help="Largest rank of an adapter.  [default: the adapters', at least 16]")
@click.option("--max-model-len", type=click.IntRange(1), help="Longest prompt and answer, in tokens.")
@click.option(
    "--drain-timeout", type=click.FloatRange(0), default=30, show_default=True, help="Seconds to end streams in."
)
@click.option("--vllm", "vllm_options", metavar="NAME[=VALUE]", multiple=True, help="Option of vLLM's; repeatable.")
@click.option("--otlp-traces-endpoint", metavar="URL", help="OpenTelemetry collector to send traces to.")
@request_limits
@click.option("--force", is_flag=True, help="Serve adapters that were trained on another base, too.")
@verbosity
def serve(pairs: tuple[str, ...], check: bool, quiet: bool, **options: Any) -> None:
    """Answer an OpenAI-compatible API with the packed model BASE and its adapters."""
    from serve import ServeConfig, collect_adapters
    from serve import serve as run

    options |= {"adapters": collect_adapters(pairs), "verbose": terminal.verbose()}
    if check:
        from serve.preflight import preflight

        for line in serving.as_lines(preflight(**options)):
            click.echo(line)
    else:
        run(ServeConfig(**options))
