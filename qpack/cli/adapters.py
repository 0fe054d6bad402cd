"""``qpack adapters``: the registry of a server's adapters, whether it runs or not."""

import getpass
import json
import os
from pathlib import Path
from typing import Any

import click

from qpack.cli.options import DIRECTORY, verbosity

registry = click.option("--registry", type=DIRECTORY, required=True, help="Directory of the server's registry.")


class VersionId(click.ParamType[tuple[str, str]]):
    """``NAME@DIGEST``; of the digest four digits or more."""

    name = "name@digest"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        name, at, digest = str(value).partition("@")
        if not at:
            self.fail(f"{value!r} is no version, expected NAME@DIGEST", param, ctx)
        return name, digest


class Share(click.ParamType[tuple[str, float]]):
    """``DIGEST=PERCENT``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        digest, _, percent = str(value).partition("=")
        try:
            return digest, float(percent)
        except ValueError:
            self.fail(f"{value!r} is no share, expected DIGEST=PERCENT", param, ctx)


version = click.argument("version", type=VersionId(), metavar="NAME@DIGEST")


@click.group()
def adapters() -> None:
    """Add adapters to a server's registry, choose which version answers, go back, remove.

    A running server follows at its next request. What runs already ends on the version it began with.
    """


@adapters.command("list")
@registry
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a version.")
@verbosity
def list_adapters(registry: Path, as_json: bool, quiet: bool) -> None:
    """Show all versions, and which of them answer."""
    from qpack.reports import adapters as report
    from serve.registry import Registry

    with Registry.open(registry) as opened:
        versions, aliases = opened.versions(), opened.aliases()
    if as_json:
        for one in report.as_json(versions, aliases):
            click.echo(json.dumps(one))
    else:
        for line in report.as_table(versions, aliases):
            click.echo(line)


@adapters.command()
@click.argument("name")
@click.argument("source")
@registry
@click.option("--base", type=DIRECTORY, help="The packed base; needed once, for a new registry.")
@click.option("--revision", help="Branch, tag or commit of an adapter of the hub.")
@click.option("--no-promote", is_flag=True, help="Let NAME point at what it did; reach this version by its id.")
@verbosity
def add(
    name: str, source: str, registry: Path, base: Path | None, revision: str | None, no_promote: bool, quiet: bool
) -> None:
    """Check the adapter SOURCE, copy it into the registry, and let NAME point at it.

    SOURCE is a directory, or the id of an adapter of the Hugging Face hub.
    """
    from qpack.sources import find_adapter
    from serve.registry import Registry

    with Registry.open(registry, base=base) as opened:
        added = opened.add(name, find_adapter(source, revision=revision), by=_user(), promote=not no_promote)
    click.echo(added.id)


@adapters.command()
@click.argument("model", metavar="NAME[@DIGEST]")
@registry
@verbosity
def remove(model: str, registry: Path, quiet: bool) -> None:
    """Remove NAME with all its versions, or one that is not live."""
    from serve.registry import Registry

    with Registry.open(registry) as opened:
        for removed in opened.remove(model):
            click.echo(f"removed {removed.id}")


@adapters.command()
@version
@registry
@verbosity
def promote(version: tuple[str, str], registry: Path, quiet: bool) -> None:
    """Let NAME point at this version, for all; this ends a canary."""
    from serve.registry import Registry

    with Registry.open(registry) as opened:
        alias = opened.promote(*version, by=_user())
    click.echo(f"{alias.name} is {alias.live.id}")


@adapters.command()
@click.argument("name")
@registry
@verbosity
def rollback(name: str, registry: Path, quiet: bool) -> None:
    """Let NAME point at what it pointed at before; once more goes back further."""
    from serve.registry import Registry

    with Registry.open(registry) as opened:
        alias = opened.rollback(name)
    click.echo(f"{alias.name} is {alias.live.id}")


@adapters.command()
@version
@registry
@click.option("--off", is_flag=True, help="Let it go again.")
@verbosity
def pin(version: tuple[str, str], registry: Path, off: bool, quiet: bool) -> None:
    """Keep this version in the engine, also while nobody asks for it."""
    from serve.registry import Registry

    with Registry.open(registry) as opened:
        pinned = opened.pin(*version, not off)
    click.echo(f"{pinned.id} is {'pinned' if pinned.pinned else 'not pinned'}")


@adapters.command()
@click.argument("name")
@click.argument("shares", metavar="[DIGEST=PERCENT]...", type=Share(), nargs=-1)
@registry
@verbosity
def canary(name: str, shares: tuple[tuple[str, float], ...], registry: Path, quiet: bool) -> None:
    """Let other versions of NAME answer some of its users, each always the same; without shares, end that."""
    from serve.registry import Registry

    with Registry.open(registry) as opened:
        alias = opened.canary(name, dict(shares))
    click.echo(f"{100 - sum(alias.canaries.values()):g} % {alias.live.id}")
    for one, percent in alias.canaries.items():
        click.echo(f"{percent:g} % {one.id}")


@adapters.command()
@click.argument("name")
@click.argument("digest", required=False)
@registry
@verbosity
def shadow(name: str, digest: str | None, registry: Path, quiet: bool) -> None:
    """Send copies of NAME's requests to another version, to compare; without DIGEST, end that."""
    from serve.registry import Registry

    with Registry.open(registry) as opened:
        alias = opened.shadow(name, digest)
    click.echo(f"{alias.name} has the shadow {alias.shadow.id}" if alias.shadow else f"{alias.name} has no shadow")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # of a number without a name, as in containers
        return f"user {os.getuid()}"
