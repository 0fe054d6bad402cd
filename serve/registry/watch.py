"""A directory whose subdirectories are adapters, kept in step with a registry: new ones are served, gone ones drained.

It is looked at, not listened to, so it may lie on a network. A subdirectory is taken in when two looks in a row have
found the same files in it, so that a copy that still goes on is not taken for a broken adapter. One that is refused
is reported once, and tried again when its files change.

A name belongs to the directory as long as all its versions came from there: what was uploaded is never taken away.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from qpack.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME
from qpack.adapters.record import RECORD_NAME
from qpack.errors import QpackError
from serve.registry.errors import RegistryError
from serve.registry.registry import Registry

_Stamp: TypeAlias = tuple[tuple[str, int, int, int], ...]
"""Name, inode, size and time of change of each file."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a look at the directory has led to."""

    name: str
    kind: Literal["added", "removed", "refused"]
    detail: str
    """The version's id, or why not."""


class Watch:
    """One directory that is watched for one registry; looked at from one thread."""

    def __init__(self, registry: Registry, directory: Path) -> None:
        self._registry = registry
        self._directory = directory
        self._by = f"directory {directory.resolve()}"
        self._seen: dict[str, _Stamp] | None = None
        """Of the look before."""
        self._settled: dict[str, _Stamp] = {}
        """Of what has been taken in or refused."""

    def scan(self) -> tuple[Change, ...]:
        """Look at the directory once, and bring the registry in step with what has not changed since the last look.

        A directory that cannot be read changes nothing: a network that is away has removed no adapters.

        Raises:
            OSError: if it cannot be read.
        """
        found = {name: _stamp(self._directory / name) for name in sorted(self._subdirectories())}
        before, self._seen = self._seen, found
        if before is None:
            return ()
        changes = []
        for name, stamp in found.items():
            if before.get(name) == stamp and self._settled.get(name) != stamp:
                changes.append(self._take_in(name))
                self._settled[name] = stamp
        changes += [self._take_out(name) for name in self._gone(found, before)]
        return tuple(change for change in changes if change)

    def _subdirectories(self) -> Iterator[str]:
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.is_dir() and not entry.name.startswith(".") and (Path(entry) / CONFIG_NAME).is_file():
                    yield entry.name

    def _take_in(self, name: str) -> Change | None:
        known = {version.digest for version in self._registry.versions(name)}
        try:
            version = self._registry.add(name, self._directory / name, by=self._by, promote=False)
            # After a restart the directory is as it was; what has been promoted or rolled back since stays so.
            if version.digest in known and name not in self._settled:
                return None
            self._registry.promote(name, version.digest, by=self._by)
        except (QpackError, OSError) as error:
            return Change(name, "refused", str(error))
        return Change(name, "added", version.id)

    def _gone(self, found: dict[str, _Stamp], before: dict[str, _Stamp]) -> list[str]:
        """The names of this directory, taken in by this process or an earlier one, that two looks have not found."""
        own = {version.name for version in self._registry.versions() if version.by == self._by}
        return sorted((own | self._settled.keys()) - found.keys() - before.keys())

    def _take_out(self, name: str) -> Change | None:
        self._settled.pop(name, None)
        versions = self._registry.versions(name)
        if not versions or any(version.by != self._by for version in versions):
            return None
        try:
            self._registry.remove(name)
        except RegistryError:  # by another process, meanwhile
            return None
        return Change(name, "removed", f"{self._directory / name} is gone")


def _stamp(directory: Path) -> _Stamp:
    files = []
    for name in (CONFIG_NAME, WEIGHTS_NAME, RECORD_NAME):
        try:
            status = (directory / name).stat()
        except OSError:
            continue
        files.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(files)
