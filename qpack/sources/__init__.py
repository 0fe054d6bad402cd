"""What the user names as a source, brought to local safetensors files: `open_source`.

A source is a model directory, one safetensors file or an index, each beside its config.json, or a model of the Hugging
Face hub. A path that exists is always taken for a path. Pickled weights are refused by name unless asked for, and then
rewritten as safetensors, tensors only. With ``low_disk`` a model of the hub is opened from its headers alone, and its
shards are fetched one at a time.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from qpack.checkpoint import PICKLED_SUFFIXES, Checkpoint, find_pickled
from qpack.companions import find_companions
from qpack.errors import CheckpointError
from qpack.sources.shards import ShardFetcher

__all__ = ["ShardFetcher", "Source", "find_adapter", "is_hub_id", "local_adapter", "open_source"]

_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Source:
    """An opened source. Its shards are read between `fetch` and `drop`, wherever they come from."""

    name: str
    """As it was asked for: a path, or a hub id."""
    revision: str | None
    """The commit of a model of the hub."""
    checkpoint: Checkpoint
    """Config and headers, checked. Where a fetcher is needed, its shards have a header but no data."""
    companions: Path
    """The directory of the files beside the weights."""
    fetcher: ShardFetcher | None = None
    """Where shards come from that are not here yet."""

    @property
    def directories(self) -> tuple[Path, ...]:
        """What must not be written to."""
        return tuple(dict.fromkeys((self.checkpoint.directory, self.companions)))

    def fetch(self, shard: Path) -> Path:
        """The file with the data of ``shard``, one of the checkpoint's, fetched if need be.

        Raises:
            CheckpointError: if it cannot be fetched.
        """
        return self.fetcher.fetch(shard.name) if self.fetcher else shard

    def drop(self, shard: Path) -> None:
        """Free the disk space that `fetch` took for ``shard``; a file that was there before stays."""
        if self.fetcher:
            self.fetcher.drop(shard.name)

    def peak_bytes(self, steps: Sequence[frozenset[Path]]) -> int:
        """The most disk space that shards take at a time, in bytes.

        ``steps`` are the shards that each step of the work reads, in order; a shard is kept from the first to the last
        step that reads it.
        """
        if not self.fetcher:
            return 0
        return self.fetcher.peak_bytes([frozenset(shard.name for shard in step) for step in steps])


def open_source(
    source: Path | str,
    *,
    work: Path,
    revision: str | None = None,
    allow_pickle: bool = False,
    low_disk: bool = False,
) -> Source:
    """Open ``source``, a path or a hub id such as ``org/name``.

    The hub's client follows ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_CACHE`` and ``HF_HUB_OFFLINE``. ``revision`` is a
    branch, tag or commit. ``work`` is a directory for what is made on the way, made when needed: rewritten pickles, or
    with ``low_disk`` headers and fetched shards. A later call with the same ``work`` goes on with half-fetched shards.

    Raises:
        CheckpointError: in one line, if the source is missing, malformed, unsafe or out of reach.
    """
    path = Path(source)
    if not path.exists():
        if not is_hub_id(str(source)):
            raise CheckpointError(f"{source}: no such file or directory, and not the id of a model of the hub")
        return _open_hub(str(source), work, revision=revision, allow_pickle=allow_pickle, low_disk=low_disk)
    for option, given in (("revision", revision is not None), ("low disk", low_disk)):
        if given:
            raise CheckpointError(f"{source}: is a local path; {option} is for models of the hub")
    companions = path if path.is_dir() else path.parent
    checkpoint = _open_local(path, work, allow_pickle=allow_pickle)
    find_companions(companions)  # refuses now what cannot be copied later
    return Source(str(source), None, checkpoint, companions)


def find_adapter(source: str, *, revision: str | None = None) -> Path:
    """The directory of a LoRA adapter: ``source`` itself if it exists, else where the hub's client has put it.

    Raises:
        CheckpointError: in one line, if it is neither there nor on the hub.
    """
    if (local := local_adapter(source, revision=revision)) is not None:
        return local
    from qpack.sources import hub

    return hub.download_adapter(source, revision)


def local_adapter(source: str, *, revision: str | None = None) -> Path | None:
    """The directory ``source`` if it exists, None if it is the id of an adapter of the hub.

    Raises:
        CheckpointError: if it can be neither, or is a directory of which a revision is asked for.
    """
    if Path(source).exists():
        if revision is not None:
            raise CheckpointError(f"{source}: is a local path; revision is for adapters of the hub")
        return Path(source)
    if not is_hub_id(source):
        raise CheckpointError(f"{source}: no such file or directory, and not the id of an adapter of the hub")
    return None


def is_hub_id(source: str) -> bool:
    """Whether ``source`` could be a hub id: ``org/name`` or ``name``, and no file name."""
    return bool(_ID.fullmatch(source)) and not source.endswith((".safetensors", ".json", *PICKLED_SUFFIXES))


def _open_local(path: Path, work: Path, *, allow_pickle: bool) -> Checkpoint:
    pickled = find_pickled(path)
    if not pickled:
        return Checkpoint.open(path)
    if not allow_pickle:
        _refuse_pickled(str(pickled[0]))
    from qpack.sources import pickles

    return Checkpoint.open(pickles.rewrite(path, work / "unpickled"))


def _open_hub(name: str, work: Path, *, revision: str | None, allow_pickle: bool, low_disk: bool) -> Source:
    from qpack.sources import hub

    model = hub.find(name, revision)
    pickled = model.pickled
    if pickled and not allow_pickle:
        _refuse_pickled(f"{name}: {pickled[0]}")
    if pickled and low_disk:
        raise CheckpointError(f"{name}: {pickled[0]}: pickled weights cannot be read one at a time from the hub")
    fetcher = None
    if low_disk and not model.is_cached:
        directory = model.write_headers(work / "headers")
        fetcher = ShardFetcher(model, work / "shards" / model.commit, model.digests())
        checkpoint = Checkpoint.open(directory)
    else:
        model.download()
        checkpoint = _open_local(model.directory, work, allow_pickle=allow_pickle)
    find_companions(model.directory)
    return Source(name, model.commit, checkpoint, model.directory, fetcher)


def _refuse_pickled(name: str) -> NoReturn:
    raise CheckpointError(f"{name}: pickled weights can run code when loaded (--allow-pickle reads tensors only)")
