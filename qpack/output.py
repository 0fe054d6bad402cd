"""Output directories that appear whole or not at all.

Work goes on in a sibling, ``.NAME.partial``, which takes the final name when everything in it is on disk. Whatever
interrupts the work (an error, Ctrl-C, kill -9, a power cut), nothing half-written ever has that name. What a killed
run leaves behind is cleared by the next; two runs at a time are kept apart by a lock, which the system drops with the
process.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qpack.errors import OutputExistsError


def refuse_existing(path: Path, *, force: bool, marker: str) -> None:
    """Refuse to write to ``path`` if something is there that may not be replaced.

    ``force`` replaces an empty directory or one that holds the file ``marker``: what was written before, but never a
    home directory given by mistake.

    Raises:
        OutputExistsError: naming ``path``.
    """
    if not path.exists():
        return
    if not force:
        raise OutputExistsError(f"{path}: already exists (--force replaces it)")
    if not path.is_dir() or (not (path / marker).is_file() and any(path.iterdir())):
        raise OutputExistsError(f"{path}: exists and is not a directory with {marker}, so it is not replaced")


def refuse_inputs(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse to write to ``path`` if that is one of ``inputs`` or holds one, which replacing it would delete.

    Raises:
        OutputExistsError: naming both.
    """
    resolved = path.resolve()
    for source in inputs:
        other = source.resolve()
        if resolved == other or resolved in other.parents:
            raise OutputExistsError(f"{path}: is or holds the input {source}, so it is not replaced")


@contextmanager
def new_directory(path: Path, *, force: bool, marker: str, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield an empty directory that becomes ``path`` when the block ends without an exception.

    With ``force``, what stands at ``path`` stays until the new directory takes its place.

    Raises:
        OutputExistsError: as `refuse_inputs` and `refuse_existing`, or if another process is writing to ``path``.
    """
    refuse_inputs(path, inputs)
    refuse_existing(path, force=force, marker=marker)
    path = path.resolve()  # so that "." has a name too
    partial = path.with_name(f".{path.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, path)
        _clear(partial)
        try:
            yield partial
            _sync(partial)
            _publish(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputExistsError(f"{path}: another process is writing it") from None


def _clear(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _publish(partial: Path, path: Path) -> None:
    """Give ``partial`` the name ``path``. Replacing takes two renames; between them the old directory is set aside."""
    replaced = path.with_name(f".{path.name}.replaced")
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    try:
        partial.rename(path)
    except BaseException:
        if replaced.exists():
            replaced.rename(path)
        raise
    _sync_directory(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


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
