"""``qpack keys``: who may ask a server."""

import json
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qpack.cli.options import DIRECTORY, verbosity
from qpack.reports.table import aligned

if TYPE_CHECKING:
    from serve.gate.keys import Key

registry = click.option("--registry", type=DIRECTORY, required=True, help="Directory of the server's registry.")
at_least_one = click.IntRange(1)


@click.group()
def keys() -> None:
    """Make, list and revoke the API keys of a server, which may be running."""


@keys.command()
@click.argument("name")
@registry
@click.option(
    "--role",
    type=click.Choice(["inference", "monitor", "admin"]),
    default="inference",
    show_default=True,
    help="What it opens: completions; metrics only; everything.",
)
@click.option("--model", "models", metavar="NAME", multiple=True, help="Adapter it may use, or the base; repeatable.")
@click.option("--requests-per-minute", type=at_least_one, help="Requests a minute.  [default: any number]")
@click.option("--tokens-per-minute", type=at_least_one, help="Tokens a minute, prompts too.  [default: any number]")
@click.option("--concurrency", type=at_least_one, help="Requests at a time.  [default: any number]")
@click.option("--weight", type=float, default=1.0, show_default=True, help="Share of an adapter, against other keys.")
@verbosity
def add(name: str, registry: Path, role: str, models: tuple[str, ...], quiet: bool, **limits: Any) -> None:
    """Make a key called NAME and print it, once: only its hash is kept."""
    from serve.gate.keys import Keys, Role

    registry.mkdir(parents=True, exist_ok=True)
    with closing(Keys(registry)) as store:
        _, token = store.add(name, Role(role), models=models or None, **limits)
    click.echo(token)


@keys.command("list")
@registry
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a key.")
@verbosity
def list_keys(registry: Path, as_json: bool, quiet: bool) -> None:
    """Show the keys and what they may do, revoked ones too."""
    from serve.gate.keys import Keys

    with closing(Keys(registry)) as store:
        found = store.list()
    if as_json:
        for key in found:
            click.echo(json.dumps({**asdict(key), "models": key.models and sorted(key.models)}))
    else:
        for line in aligned([_HEADINGS, *map(_row, found)]):
            click.echo(line)


@keys.command()
@click.argument("name")
@registry
@verbosity
def revoke(name: str, registry: Path, quiet: bool) -> None:
    """Refuse the key NAME, a name or an id, from now on; a running server too."""
    from serve.gate.keys import Keys

    with closing(Keys(registry)) as store:
        key = store.revoke(name)
    click.echo(f"revoked {key.name} (qp-{key.id})")


_HEADINGS = ("name", "key", "role", "models", "requests/min", "tokens/min", "at a time", "weight", "last used", "state")


def _row(key: "Key") -> tuple[str, ...]:
    limits = (key.requests_per_minute, key.tokens_per_minute, key.concurrency)
    return (
        key.name,
        f"qp-{key.id}-...",
        key.role,
        "all" if key.models is None else ",".join(sorted(key.models)),
        *("any" if limit is None else f"{limit:,}" for limit in limits),
        f"{key.weight:g}",
        "never" if key.last_used is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(key.last_used)),
        "live" if key.revoked is None else "revoked",
    )
