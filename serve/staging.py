"""Copies of adapter files in memory, so that nothing in the engine ever waits for a disk.

The engine maps the safetensors file that it loads: a page that a slow disk has not delivered yet would stop it at any
later moment, with every stream that it serves. A copy on tmpfs has no such pages. It is written under another name and
renamed when it is whole; its path depends on the version alone, for vLLM keys its prefix cache on it.

    /dev/shm/qpack-stage-<random>/    of one running server, locked by it
        support@3f2a91c04b7d/         of one version that is in the engine or on its way there
            adapter_config.json
            adapter_model.safetensors

Where tmpfs has no room the copy is made on disk, in the directory for temporary files: written just now, its pages
are in memory as a rule.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MEMORY = Path("/dev/shm")
_PREFIX = "qpack-stage-"

# Left free on tmpfs for others: vLLM's own shared memory, other programs.
_SPARE = 256 << 20

_CHUNK = 4 << 20


class Stage:
    """Directories, the fastest first, that versions are copied into. Made by `open_stage`."""

    def __init__(self, directories: list[Path]) -> None:
        self._directories = directories

    def put(self, name: str, source: Path) -> Path:
        """Copy the files of ``source`` and return the directory of the copy. Blocks as long as the storage does.

        Raises:
            OSError: if the source cannot be read in full or nowhere is room; then no copy is left.
        """
        files = sorted(source.iterdir())
        size = sum(file.stat().st_size for file in files)
        home = next((home for home in self._directories[:-1] if _free(home) > size + _SPARE), self._directories[-1])
        partial = Path(tempfile.mkdtemp(prefix=".", dir=home))
        try:
            for file in files:
                with file.open("rb") as original, (partial / file.name).open("xb") as copy:
                    shutil.copyfileobj(original, copy, _CHUNK)
            self.drop(name)  # by a load that was given up, if there is one
            return partial.rename(home / name)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def drop(self, name: str) -> None:
        """Remove a copy; what maps its files keeps them until it lets go."""
        for home in self._directories:
            shutil.rmtree(home / name, ignore_errors=True)


@contextmanager
def open_stage() -> Iterator[Stage]:
    """Make the directories of one server and remove them at the end, and those of servers that were killed."""
    homes = dict.fromkeys(home for home in (MEMORY, Path(tempfile.gettempdir())) if os.access(home, os.W_OK))
    made: list[tuple[Path, int]] = []
    try:
        for home in homes:
            _sweep(home)
            made.append(_make(home))
        yield Stage([directory for directory, _ in made])
    finally:
        for directory, descriptor in made:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(descriptor)


def _make(home: Path) -> tuple[Path, int]:
    """Make a directory and lock it; make another if a server that starts now has swept it away in between."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=home))
        with suppress(OSError):
            descriptor = _lock(directory)
            if directory.exists():
                return directory, descriptor
            os.close(descriptor)


def _sweep(home: Path) -> None:
    """Remove directories whose lock is free: the process that held it is gone."""
    for directory in home.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            descriptor = _lock(directory)
            shutil.rmtree(directory, ignore_errors=True)
            os.close(descriptor)


def _lock(directory: Path) -> int:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _free(directory: Path) -> int:
    return shutil.disk_usage(directory).free
