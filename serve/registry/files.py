"""The registry's own copies of adapter files, each directory under the digest of what it holds.

::

    REGISTRY/incoming/      what is being copied and checked, and what is being deleted
    REGISTRY/store/DIGEST/  adapter_config.json, adapter_model.safetensors; read only

A version is copied into ``incoming``, brought to disk and then renamed into ``store``, so a kill at any moment leaves a
whole one or none. Whoever works on a directory, or reads it, holds a lock on it that the system drops with the process:
`sweep` takes away all that nobody refers to and nobody holds, whatever ended before.

The callers see to it that staging, publishing and sweeping are never at the same time (`serve.registry.database`).
"""

import fcntl
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from qpack.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME
from qpack.adapters.record import RECORD_NAME
from qpack.checkpoint import PICKLED_SUFFIXES, model_file
from qpack.errors import CheckpointError
from qpack.output import free_bytes, sync, sync_directory
from qpack.sizes import format_size
from serve.registry.errors import RegistryError
from serve.registry.limits import CONFIG_BYTES, Limits

_PIECE = 1 << 20


class Files:
    """The files under one registry's directory."""

    def __init__(self, directory: Path) -> None:
        self._incoming = directory / "incoming"
        self._store = directory / "store"
        for path in (self._incoming, self._store):
            path.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where a version's files are, or would be."""
        return self._store / digest

    def begin(self) -> "Staged":
        """Make a new directory to copy into, with a lock on it."""
        return Staged(self._incoming / token_hex(8))

    def publish(self, staged: "Staged", digest: str) -> None:
        """Give what was staged its name, if its like is not there already."""
        if not self.path(digest).exists():
            staged.directory.rename(self.path(digest))
            sync_directory(self._store)

    @contextmanager
    def hold(self, digest: str) -> Iterator[Path]:
        """Keep a version's files from being swept, in whatever process, until the block ends.

        Raises:
            RegistryError: if they are gone.
        """
        path = self.path(digest)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise RegistryError(f"{path}: no such version", 404) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
                raise RegistryError(f"{path}: no such version", 404)  # swept before the lock was ours
            yield path
        finally:
            os.close(descriptor)

    def sweep(self, referred: Collection[str]) -> None:
        """Delete the versions but those of the digests ``referred``, and what killed processes have left."""
        for path in self._store.iterdir():
            if path.name not in referred:
                self._delete(path)
        for path in self._incoming.iterdir():
            self._delete(path)

    def _delete(self, path: Path) -> None:
        """Delete a directory that nobody holds, out of sight first, so that no half of it is ever found."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            trash = self._incoming / token_hex(8)
            path.rename(trash)
            shutil.rmtree(trash)
        except BlockingIOError:
            pass  # the next sweep
        finally:
            os.close(descriptor)


class Staged:
    """A directory in the making; deleted by `close` unless it was published."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self._descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def copy(self, source: Path, limits: Limits) -> None:
        """Copy the adapter in ``source``: its settings, its weights, and what qpack has recorded of it.

        Raises:
            RegistryError: if a file is missing, is none, lies elsewhere, or is larger than it may be.
        """
        require_safetensors(source)
        left = limits.max_bytes
        for name, limit in ((CONFIG_NAME, CONFIG_BYTES), (RECORD_NAME, CONFIG_BYTES), (WEIGHTS_NAME, left)):
            if name != RECORD_NAME or os.path.lexists(source / name):
                left -= self._copy_file(source, name, min(limit, left))

    def finish(self, config: str) -> int:
        """Put ``config`` in the place of the settings that were copied, and bring all to disk.

        Returns the bytes of the files.
        """
        (self.directory / RECORD_NAME).unlink(missing_ok=True)
        (self.directory / CONFIG_NAME).write_text(config, encoding="utf-8")
        files = list(self.directory.iterdir())
        for path in files:
            path.chmod(0o444)
        sync(self.directory)
        return sum(path.stat().st_size for path in files)

    def close(self) -> None:
        """Delete the directory if it was not published, and let go of it."""
        shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._descriptor)

    def _copy_file(self, source: Path, name: str, limit: int) -> int:
        path = source / name
        try:
            target = os.path.realpath(model_file(source, name))
            # A named pipe would keep us waiting for ever, and a link may have come in since.
            descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except CheckpointError as error:
            raise RegistryError(str(error)) from None
        except FileNotFoundError:
            raise RegistryError(f"{path}: no such file") from None
        except OSError as error:
            raise RegistryError(f"{path}: {error.strerror}") from None
        with open(descriptor, "rb") as file, (self.directory / name).open("wb") as copy:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise RegistryError(f"{path}: not a file")
            self._require_room(path, status.st_size, limit)
            copied = 0
            while piece := file.read(_PIECE):
                copied += len(piece)
                if copied > limit:  # it has grown
                    raise _too_large(path, copied, limit)
                copy.write(piece)
        return copied

    def _require_room(self, path: Path, size: int, limit: int) -> None:
        if size > limit:
            raise _too_large(path, size, limit)
        free = free_bytes(self.directory)
        if size > free:
            raise RegistryError(f"{path}: {format_size(size)}, the registry's disk has {format_size(free)} free", 507)


def _too_large(path: Path, size: int, limit: int) -> RegistryError:
    return RegistryError(f"{path}: {format_size(size)}, expected at most {format_size(limit)}", 413)


def require_safetensors(source: Path) -> None:
    """Refuse what is no directory, or holds pickled weights alone."""
    if not source.is_dir():
        raise RegistryError(f"{source}: not a directory")
    if not os.path.lexists(source / WEIGHTS_NAME):
        for path in sorted(source.glob("adapter_model.*")):
            if path.suffix in PICKLED_SUFFIXES:
                raise RegistryError(
                    f"{path}: pickled weights can run code when loaded; save them as {WEIGHTS_NAME} first"
                )
