"""Shards of a hub model, on disk one at a time.

A shard is fetched in ranges to ``NAME.partial`` and gets its name when it is complete and its SHA-256 is the one that
the hub lists. What a cut connection or a killed run leaves is gone on with. A shard that is in the hub client's cache
is read from there, and never dropped.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qpack.errors import CheckpointError

if TYPE_CHECKING:
    from qpack.sources.hub import Model


@dataclass(frozen=True)
class ShardFetcher:
    """The shards of ``model``, in ``directory`` while they are needed. For one thread at a time."""

    model: "Model"
    directory: Path
    digests: Mapping[str, str]
    """SHA-256 by name, as the hub lists them."""

    def fetch(self, file: str) -> Path:
        """The path of ``file``, fetched if it is not there.

        Raises:
            CheckpointError: if the hub cannot be reached or sends other bytes than it lists.
        """
        cached = self.model.directory / file
        if cached.is_file():
            return cached
        path = self.directory / file
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{file}.partial")
            self._fetch(file, partial)
            self._check(file, partial)
            partial.rename(path)
        return path

    def drop(self, file: str) -> None:
        """Delete what `fetch` fetched."""
        (self.directory / file).unlink(missing_ok=True)

    def peak_bytes(self, steps: Sequence[frozenset[str]]) -> int:
        """The most bytes in ``directory`` at a time, if step by step each file is there from its first to its last."""
        last = {file: index for index, step in enumerate(steps) for file in step}
        held: set[str] = set()
        peak = 0
        for index, step in enumerate(steps):
            held |= {file for file in step if not (self.model.directory / file).is_file()}
            peak = max(peak, sum(self.model.files[file] for file in held))
            held -= {file for file in held if last[file] == index}
        return peak

    def _fetch(self, file: str, partial: Path) -> None:
        with partial.open("ab") as target:
            for piece in self.model.read(file, target.tell(), self.model.files[file]):
                target.write(piece)
            target.flush()
            os.fsync(target.fileno())

    def _check(self, file: str, partial: Path) -> None:
        if file not in self.digests:
            return  # kept in git itself, as small files are, and listed without one
        with partial.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != self.digests[file]:
            partial.unlink()
            reason = f"SHA-256 is {found}, the hub lists {self.digests[file]}; fetched bytes deleted"
            raise CheckpointError(f"{self.model.name}: {file}: {reason}")
