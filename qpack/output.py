"""Output directories that appear whole or not at all.

Work goes on in a sibling, ``.NAME.partial``, which is renamed when everything in it is on disk. Whatever interrupts
the work (an error, Ctrl-C, kill -9, a power cut), no directory under the final name is ever half-written; a partial
one left by a killed run is replaced by the next.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpack.errors import OutputExistsError


@contextmanager
def new_directory(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty directory that becomes ``path`` when the block ends without an exception.

    Raises:
        OutputExistsError: at once, if ``path`` exists and ``force`` is not set. With it, the old directory stays
            until the new one takes its place.
    """
    refuse_existing(path, force=force)
    # Resolved, so that "." and ".." have names too.
    path = path.resolve()
    partial = path.with_name(f".{path.name}.partial")
    replaced = path.with_name(f".{path.name}.replaced")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        partial.rename(path)
        _sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def refuse_existing(path: Path, *, force: bool) -> None:
    """Refuse to write to ``path`` if something is there that may not be replaced.

    Raises:
        OutputExistsError: if it exists and ``force`` is not set, or if it is not a directory.
    """
    if path.exists() and not path.is_dir():
        raise OutputExistsError(f"{path}: exists and is not a directory")
    if path.exists() and not force:
        raise OutputExistsError(f"{path}: already exists (--force replaces it)")


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
