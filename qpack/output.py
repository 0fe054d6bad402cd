"""Output directories that appear whole or not at all, and that interrupted work goes on with.

Work goes on in a sibling, ``.NAME.partial``, which takes the final name when everything in it is on disk. Whatever
interrupts the work (an error, Ctrl-C, kill -9, a power cut), nothing half-written ever has that name. What a killed
run leaves behind is gone on with by the next one where that has the same inputs, else cleared; two runs at a time are
kept apart by a lock, which the system drops with the process.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qpack import _core
from qpack.errors import DiskFullError, HubError, OutputExistsError, QpackError, TrainingError
from qpack.sizes import format_size

logger = logging.getLogger(__name__)

_INPUTS_NAME = ".inputs"
"""Text that tells what the work in a partial directory is made from."""
_SCRATCH_NAME = ".scratch"


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
    """Refuse to write to ``path`` if that is one of ``inputs``, holds one or lies in one.

    Raises:
        OutputExistsError: naming both.
    """
    resolved = path.resolve()
    for source in inputs:
        other = source.resolve()
        if resolved == other or resolved in other.parents:
            raise OutputExistsError(f"{path}: is or holds the input {source}, so it is not replaced")
        if other in resolved.parents:
            raise OutputExistsError(f"{path}: lies in the input {source}, which is only read")


def refuse_full_disk(path: Path, size: int) -> None:
    """Refuse to begin on ``size`` bytes for ``path`` if its disk has no room for them.

    What an interrupted run has written of them already counts as room.

    Raises:
        DiskFullError: with what is needed and what is free.
    """
    partial = _partial(path.resolve())
    written = sum(file.stat().st_blocks * 512 for file in partial.glob("*") if file.is_file())
    room = free_bytes(path)
    if size - written > room:
        raise DiskFullError(f"{path}: needs {format_size(size - written)}, its disk has {format_size(room)} free")


def free_bytes(path: Path) -> int:
    """Bytes free for us on the disk that ``path`` is or will be on."""
    existing = next(parent for parent in (path.resolve(), *path.resolve().parents) if parent.exists())
    return shutil.disk_usage(existing).free


class Work:
    """An output directory in the making."""

    def __init__(self, partial: Path) -> None:
        self.directory = partial
        """What will be published, but for names that begin with a dot."""
        self.scratch = partial / _SCRATCH_NAME
        """A place, made when needed, for what is not; an interrupted run leaves it to the next one."""
        self._resumable = False

    def begin(self, inputs: str) -> None:
        """Keep what an interrupted run of the same ``inputs`` has written, and clear everything else.

        ``inputs`` is a text that changes with anything that the output depends on. From here on, work that ends by
        anything but bad input leaves what the next run can go on with.
        """
        path = self.directory / _INPUTS_NAME
        if not path.is_file() or path.read_text(encoding="utf-8") != inputs:
            path.unlink(missing_ok=True)  # first: nobody goes on from what is half cleared
            _clear(self.directory, keep=_SCRATCH_NAME)
            new = self.directory / f"{_INPUTS_NAME}.new"
            new.write_text(inputs, encoding="utf-8")
            new.rename(path)
        self._resumable = True

    def leave(self, error: BaseException) -> None:
        """Clear up after ``error``, as far as a next run cannot go on."""
        begun = self._resumable or (self.directory / _INPUTS_NAME).exists()
        bad_input = isinstance(error, QpackError) and not isinstance(error, DiskFullError | HubError | TrainingError)
        finished = any(path.is_file() and path.name != _INPUTS_NAME for path in self.directory.rglob("*"))
        if bad_input or not begun or not finished:
            shutil.rmtree(self.directory, ignore_errors=True)
        else:
            logger.info("%s: what is finished is kept; the same command goes on from there", _final(self.directory))


@contextmanager
def resumable_directory(path: Path, *, force: bool, marker: str, inputs: Iterable[Path] = ()) -> Iterator[Work]:
    """Yield the work on a directory that becomes ``path`` when the block ends without an exception.

    With ``force``, what stands at ``path`` stays until the new directory takes its place. Until `Work.begin` is called
    the directory may hold what another run left.

    Raises:
        OutputExistsError: as `refuse_inputs` and `refuse_existing`, or if another process is writing to ``path``.
    """
    refuse_inputs(path, inputs)
    refuse_existing(path, force=force, marker=marker)
    path = path.resolve()  # so that "." has a name too
    partial = _partial(path)
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, path)
        work = Work(partial)
        try:
            yield work
            sync(partial)
            leftovers = _set_aside(partial, path)
            _publish(partial, path)
            shutil.rmtree(leftovers, ignore_errors=True)
        except BaseException as error:
            work.leave(error)
            raise
    finally:
        os.close(descriptor)


@contextmanager
def new_directory(path: Path, *, force: bool, marker: str, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield an empty directory that becomes ``path`` when the block ends without an exception, and else is removed.

    Raises:
        OutputExistsError: as `resumable_directory`.
    """
    with resumable_directory(path, force=force, marker=marker, inputs=inputs) as work:
        _clear(work.directory)
        yield work.directory


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _final(partial: Path) -> Path:
    return partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputExistsError(f"{path}: another process is writing it") from None


def _clear(directory: Path, pattern: str = "*", *, keep: str = "") -> None:
    for entry in directory.glob(pattern):
        if entry.name == keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _set_aside(partial: Path, path: Path) -> Path:
    """Move what is not published out of ``partial``, and return where to.

    Deleting it there could take a while, in which a kill would leave a part of it for the next run to go on from.
    """
    leftovers = path.with_name(f".{path.name}.leftovers")
    shutil.rmtree(leftovers, ignore_errors=True)
    leftovers.mkdir()
    for entry in sorted(partial.glob(".*"), key=lambda entry: entry.name != _INPUTS_NAME):  # nothing goes on without it
        entry.rename(leftovers / entry.name)
    return leftovers


def _publish(partial: Path, path: Path) -> None:
    """Give ``partial`` the name ``path``. What stands there changes names with it, at once where the system can."""
    if not path.exists():
        partial.rename(path)
        sync_directory(path.parent)
        return
    try:
        _core.exchange(partial, path)
    except OSError:
        replaced = path.with_name(f".{path.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
        try:
            partial.rename(path)
        except BaseException:
            replaced.rename(path)
            raise
        partial = replaced
    sync_directory(path.parent)
    shutil.rmtree(partial, ignore_errors=True)


def sync(directory: Path) -> None:
    """Bring everything in ``directory`` to disk, so that a power cut after a rename finds it whole."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_directory(path)
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Bring the names in ``directory`` to disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
