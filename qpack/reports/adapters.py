"""What ``qpack adapters list`` prints: a version a line, and what its name makes of it."""

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qpack.reports.table import aligned
from qpack.sizes import format_size

if TYPE_CHECKING:
    from serve.registry import Alias, Version

_HEADINGS = ("version", "state", "rank", "size", "added", "by")


def as_table(versions: tuple["Version", ...], aliases: Mapping[str, "Alias"]) -> list[str]:
    """The lines of a table, a heading first: by name, oldest version first."""
    return aligned([_HEADINGS, *(_row(version, aliases.get(version.name)) for version in _by_name(versions))])


def as_json(versions: tuple["Version", ...], aliases: Mapping[str, "Alias"]) -> Iterator[dict[str, Any]]:
    """An object a version, in the same order."""
    for version in _by_name(versions):
        alias = aliases.get(version.name)
        yield {
            "id": version.id,
            "name": version.name,
            "digest": version.digest,
            "live": alias is not None and alias.live == version,
            "canary": alias.canaries.get(version, 0) if alias else 0,
            "shadow": alias is not None and alias.shadow == version,
            "pinned": version.pinned,
            "unservable": version.unservable,
            "rank": version.rank,
            "size": version.size,
            "base": version.base,
            "added": version.added,
            "by": version.by,
            "path": str(version.path) if version.path.parts else None,
        }


def state(version: "Version", alias: "Alias | None") -> str:
    """In words: live, a canary, a shadow, pinned, unservable, or nothing of that."""
    words = []
    if alias and alias.live == version:
        words.append("live")
    if alias and version in alias.canaries:
        words.append(f"canary {alias.canaries[version]:g} %")
    if alias and alias.shadow == version:
        words.append("shadow")
    if version.pinned:
        words.append("pinned")
    if version.unservable:
        words.append("unservable")
    return ", ".join(words) or "-"


def _by_name(versions: tuple["Version", ...]) -> list["Version"]:
    return sorted(versions, key=lambda version: version.name)


def _row(version: "Version", alias: "Alias | None") -> tuple[str, ...]:
    added = time.strftime("%Y-%m-%d %H:%M", time.localtime(version.added))
    return (version.id, state(version, alias), str(version.rank), format_size(version.size), added, version.by)
