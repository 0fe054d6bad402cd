"""Models of the Hugging Face hub, through its own client: found, listed, downloaded, or opened by their headers.

Weights are the index's files or ``model.safetensors``, as transformers takes them; nothing else that is large is
downloaded (other formats, original checkpoints, subfolders). Downloads go to the client's cache: a cut connection is
resumed where it broke, and a file that is complete is never fetched again. The client's errors become one line.
"""

import glob
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import httpx2  # what the hub's client is built on
import huggingface_hub
from huggingface_hub import RepoFile, constants, errors
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but exported lazily
    build_hf_headers,
    disable_progress_bars,
    hf_raise_for_status,
    http_stream_backoff,
)

from qpack.adapters.adapter import CONFIG_NAME as ADAPTER_CONFIG_NAME
from qpack.adapters.adapter import WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME
from qpack.adapters.record import RECORD_NAME
from qpack.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    PICKLED_INDEX_NAME,
    PICKLED_NAME,
    SINGLE_NAME,
    read_index,
)
from qpack.errors import CheckpointError, HubError

# What goes along with the weights: configuration, tokenizer, chat template, custom code, licence and model card.
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "*.md", "LICENSE*", "NOTICE*")

_ADAPTER_FILES = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, RECORD_NAME)

# One request gets the length and, of most files, the whole header.
_FIRST_BYTES = 100_000

# Attempts in a row that bring not one byte, and the pause after each, in seconds.
_ATTEMPTS = 5
_PAUSE = 1.0

# As in Rust, which checks the header itself.
_MAX_HEADER_LEN = 100_000_000


@dataclass(frozen=True)
class Model:
    """A model of the hub at one commit; its companions are here."""

    name: str
    commit: str
    directory: Path
    """The snapshot in the client's cache."""
    files: Mapping[str, int]
    """Every file at its top, and its size in bytes."""

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """The safetensors files, in the order of their names; none if there are only pickles."""
        if INDEX_NAME in self.files:
            return tuple(sorted(set(read_index(self.directory / INDEX_NAME).values())))
        return (SINGLE_NAME,) if SINGLE_NAME in self.files else ()

    @cached_property
    def pickled(self) -> tuple[str, ...]:
        """The pickled weights, if there are no others."""
        if self.shards:
            return ()
        if PICKLED_INDEX_NAME in self.files:
            return tuple(sorted(set(read_index(self.directory / PICKLED_INDEX_NAME).values())))
        return (PICKLED_NAME,) if PICKLED_NAME in self.files else ()

    @property
    def is_cached(self) -> bool:
        """Whether all shards are in the cache already."""
        return all((self.directory / shard).is_file() for shard in self.shards)

    def download(self) -> None:
        """Download the weights to the cache.

        Raises:
            CheckpointError: if the hub cannot be reached or lacks a file.
        """
        patterns = [glob.escape(file) for file in self.shards or self.pickled]
        with one_line(self.name, self.commit):
            huggingface_hub.snapshot_download(self.name, revision=self.commit, allow_patterns=patterns)

    def write_headers(self, directory: Path) -> Path:
        """Fetch the shards' headers, and write files of the full sizes that hold nothing else and take no space.

        They are for planning; with the config and the index beside them they open as any checkpoint does.
        """
        directory.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_NAME, INDEX_NAME):
            if (self.directory / name).is_file():
                (directory / name).write_bytes((self.directory / name).read_bytes())
        with ThreadPoolExecutor(8) as threads:
            for shard, header in zip(self.shards, threads.map(self._header, self.shards), strict=True):
                with (directory / shard).open("wb") as file:
                    file.write(header)
                    file.truncate(self._size(shard))
        return directory

    def digests(self) -> dict[str, str]:
        """The SHA-256 that the hub lists for each large file.

        Raises:
            CheckpointError: if it cannot be reached.
        """
        with one_line(self.name, self.commit):
            listing = huggingface_hub.list_repo_tree(self.name, revision=self.commit)
            return {file.path: file.lfs.sha256 for file in listing if isinstance(file, RepoFile) and file.lfs}

    def read(self, file: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes of ``file`` from ``start`` to ``end``; where the connection breaks, go on with a new one.

        Raises:
            CheckpointError: if the hub cannot be reached, or sends another range.
        """
        failures = 0
        with one_line(self.name, self.commit):
            while start < end:
                before = start
                try:
                    for piece in self._stream(file, start, end):
                        start += len(piece)
                        yield piece
                except httpx2.TransportError:
                    failures = failures + 1 if start == before else 0
                    if failures == _ATTEMPTS:
                        raise
                    time.sleep(_PAUSE)

    def _size(self, name: str) -> int:
        if name not in self.files:
            raise CheckpointError(f"{self.name}: no file {name} at {self.commit}, but {INDEX_NAME} names it")
        return self.files[name]

    def _header(self, shard: str) -> bytes:
        size = self._size(shard)
        start = b"".join(self.read(shard, 0, min(size, _FIRST_BYTES)))
        end = 8 + int.from_bytes(start[:8], "little")
        if end > min(size, _MAX_HEADER_LEN):
            return start  # malformed in a way that Rust will name
        return start[:end] + b"".join(self.read(shard, len(start), end))

    def _stream(self, file: str, start: int, end: int) -> Iterator[bytes]:
        url = huggingface_hub.hf_hub_url(self.name, file, revision=self.commit)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        # No retries on exceptions: they would also catch those of the body, which is not read there.
        with http_stream_backoff("GET", url, headers=headers, timeout=timeout, retry_on_exceptions=()) as response:
            hf_raise_for_status(response)
            served = response.headers.get("Content-Range", "").removeprefix("bytes ").split("/")[0]
            if response.status_code != 206 or served != f"{start}-{end - 1}":
                raise CheckpointError(f"{self.name}: {file}: the server does not send bytes {start} to {end} alone")
            yield from response.iter_raw()  # as it comes: what has come is kept


def find(name: str, revision: str | None) -> Model:
    """Look the model ``name`` up and download its companions.

    Raises:
        CheckpointError: in one line, if there is no such model or revision, if it is gated, if it cannot be reached and
            is not in the cache, or if it holds no weights.
    """
    with one_line(name, revision):
        snapshot = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(COMPANIONS), ignore_patterns=["*/*"]
        )
    directory = Path(snapshot)
    try:
        listing = huggingface_hub.get_cached_repo_tree(name, revision=directory.name)
    except errors.CachedRepoTreeNotFoundError:  # a cache of an older client, offline
        files = {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}
    else:
        files = {file.path: file.size for file in listing if "/" not in file.path}
    model = Model(name, directory.name, directory, files)
    if not model.shards and not model.pickled:
        raise CheckpointError(f"{name}: no {INDEX_NAME} and no {SINGLE_NAME} at {model.commit}")
    return model


def show_no_progress() -> None:
    """Let the client draw no bars from now on."""
    disable_progress_bars()


def is_offline() -> bool:
    """Whether the client is told to ask nobody."""
    return constants.is_offline_mode()


def adapter_size(name: str, revision: str | None) -> tuple[str, int]:
    """The commit that a revision is now, and the bytes of what `download_adapter` would fetch of it.

    Raises:
        HubError: in one line, if there is no such repository or revision, or the hub cannot be reached.
    """
    with one_line(name, revision):
        commit = str(huggingface_hub.model_info(name, revision=revision).sha)
        listing = huggingface_hub.list_repo_tree(name, revision=commit)
        return commit, sum(file.size for file in listing if isinstance(file, RepoFile) and file.path in _ADAPTER_FILES)


def download_adapter(name: str, revision: str | None, *, cache: Path | None = None) -> Path:
    """Download the settings and the safetensors of a LoRA adapter, and return where they are.

    ``cache`` takes the place of the client's own.

    Raises:
        HubError: in one line, if there is no such repository, or it cannot be reached and is not in the cache.
    """
    with one_line(name, revision):
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=[*_ADAPTER_FILES], cache_dir=cache
            )
        )


@contextmanager
def one_line(name: str, revision: str | None, *, kind: str = "model") -> Iterator[None]:
    """Turn the client's errors, which are paragraphs, into one line."""
    try:
        yield
    except errors.GatedRepoError:
        reason = f"gated; accept its terms at {constants.ENDPOINT}/{name} and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"no revision {revision} on {constants.ENDPOINT}"
    except errors.RepositoryNotFoundError:
        reason = f"no such path, and no such {kind} on {constants.ENDPOINT}, or a private one (set HF_TOKEN)"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{constants.ENDPOINT} cannot be reached"
        reason = f"no such path, not in the cache of the hub, and {why}"
    except errors.HFValidationError as error:
        reason = f"no such path, and not a hub id: {str(error).splitlines()[0]}"
    except (errors.HfHubHTTPError, errors.FileMetadataError, httpx2.HTTPError) as error:
        lines = [line for line in str(error).splitlines() if line]
        reason = f"{constants.ENDPOINT}: {lines[0] if lines else type(error).__name__}"
    else:
        return
    raise HubError(f"{name}: {reason}")
