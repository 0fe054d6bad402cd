"""``qpack adapters``: a server's adapters, in its registry's directory or over its API."""

import getpass
import json
import os
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import click

from qpack import terminal
from qpack.cli.options import DIRECTORY, verbosity

if TYPE_CHECKING:
    from serve.registry import Registry
    from serve.remote import RemoteAdapters

Command = TypeVar("Command", bound=Callable[..., Any])

Opening: TypeAlias = Callable[..., "Registry | RemoteAdapters"]
"""Both have the same methods."""


def where(command: Command) -> Command:
    """Add the options that say which server's adapters are meant. The command gets ``opening``, to be called once."""

    @wraps(command)
    def placed(registry: Path | None, url: str | None, key: str | None, **options: Any) -> Any:
        if registry is not None and url is None:
            return command(opening=partial(_open_registry, registry), **options)
        if url is not None and registry is None:
            return command(opening=partial(_open_server, url, key), **options)
        raise click.UsageError("one of --registry and --url says which server's adapters are meant")

    for option in (
        click.option("--key", envvar="QPACK_API_KEY", show_envvar=True, help="An admin's API key, for --url."),
        click.option("--url", metavar="http://HOST:PORT", help="Address of a running server."),
        click.option("--registry", type=DIRECTORY, help="Directory of the server's registry, on this machine."),
    ):
        placed = option(placed)
    return cast(Command, placed)


def _open_registry(directory: Path, *, base: Path | None = None) -> "Registry":
    from serve.registry import Registry

    return Registry.open(directory, base=base)


def _open_server(url: str, key: str | None, *, base: Path | None = None) -> "RemoteAdapters":
    from serve.remote import RemoteAdapters

    if base is not None:
        raise click.UsageError("--base is for a new registry; a server has its own")
    return RemoteAdapters(url, key)


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
@where
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a version.")
@verbosity
def list_adapters(opening: Opening, as_json: bool, quiet: bool) -> None:
    """Show all versions, and which of them answer."""
    from qpack.reports import adapters as report

    with opening() as opened:
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
@where
@click.option("--base", type=DIRECTORY, help="The packed base; needed once, for a new registry.")
@click.option("--revision", help="Branch, tag or commit of an adapter of the hub.")
@click.option("--no-promote", is_flag=True, help="Let NAME point at what it did; reach this version by its id.")
@verbosity
def add(
    name: str, source: str, opening: Opening, base: Path | None, revision: str | None, no_promote: bool, quiet: bool
) -> None:
    """Check the adapter SOURCE, copy it into the registry, and let NAME point at it.

    SOURCE is a directory, or the id of an adapter of the Hugging Face hub; with --url the server fetches that.
    """
    from qpack.sources import find_adapter, local_adapter
    from serve.registry import Registry

    by, promote = _user(), not no_promote
    with opening(base=base) as opened:
        if isinstance(opened, Registry):
            added = opened.add(name, find_adapter(source, revision=revision), by=by, promote=promote)
        elif (local := local_adapter(source, revision=revision)) is None:
            added = opened.fetch(name, source, revision=revision, by=by, promote=promote)
        else:
            with terminal.progress("upload", "bytes", quiet=quiet) as on_progress:
                added = opened.add(name, local, by=by, promote=promote, on_progress=on_progress)
    click.echo(added.id)


@adapters.command()
@click.argument("model", metavar="NAME[@DIGEST]")
@where
@verbosity
def remove(model: str, opening: Opening, quiet: bool) -> None:
    """Remove NAME with all its versions, or one that is not live."""
    with opening() as opened:
        for removed in opened.remove(model):
            click.echo(f"removed {removed.id}")


@adapters.command()
@version
@where
@verbosity
def promote(version: tuple[str, str], opening: Opening, quiet: bool) -> None:
    """Let NAME point at this version, for all; this ends a canary."""
    with opening() as opened:
        alias = opened.promote(*version, by=_user())
    click.echo(f"{alias.name} is {alias.live.id}")


@adapters.command()
@click.argument("name")
@where
@verbosity
def rollback(name: str, opening: Opening, quiet: bool) -> None:
    """Let NAME point at what it pointed at before; once more goes back further."""
    with opening() as opened:
        alias = opened.rollback(name)
    click.echo(f"{alias.name} is {alias.live.id}")


@adapters.command()
@version
@where
@click.option("--off", is_flag=True, help="Let it go again.")
@verbosity
def pin(version: tuple[str, str], opening: Opening, off: bool, quiet: bool) -> None:
    """Keep this version in the engine, also while nobody asks for it."""
    with opening() as opened:
        pinned = opened.pin(*version, not off)
    click.echo(f"{pinned.id} is {'pinned' if pinned.pinned else 'not pinned'}")


@adapters.command()
@click.argument("name")
@click.argument("shares", metavar="[DIGEST=PERCENT]...", type=Share(), nargs=-1)
@where
@verbosity
def canary(name: str, shares: tuple[tuple[str, float], ...], opening: Opening, quiet: bool) -> None:
    """Let other versions of NAME answer some of its users, each always the same; without shares, end that."""
    with opening() as opened:
        alias = opened.canary(name, dict(shares))
    click.echo(f"{100 - sum(alias.canaries.values()):g} % {alias.live.id}")
    for one, percent in alias.canaries.items():
        click.echo(f"{percent:g} % {one.id}")


@adapters.command()
@click.argument("name")
@click.argument("digest", required=False)
@where
@verbosity
def shadow(name: str, digest: str | None, opening: Opening, quiet: bool) -> None:
    """Send copies of NAME's requests to another version, to compare; without DIGEST, end that."""
    with opening() as opened:
        alias = opened.shadow(name, digest)
    click.echo(f"{alias.name} has the shadow {alias.shadow.id}" if alias.shadow else f"{alias.name} has no shadow")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # of a number without a name, as in containers
        return f"user {os.getuid()}"
