"""Packing a checkpoint: a Hugging Face model in, a bitsandbytes NF4 model directory out.

The result loads in stock transformers, PEFT and vLLM. Where the source comes from is `qpack.sources`' matter, which
weights are packed and how `qpack.policy`'s. Rust does the arithmetic and the streaming, with a few chunks a thread in
memory whatever the size of the model. Everything that can be checked without the weights' data is checked before the
first byte is written; a run that is interrupted goes on with the same command.
"""

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qpack import _core
from qpack.checkpoint import CONFIG_NAME
from qpack.companions import copy_companions, write_config
from qpack.inspection import Inspection, inspect
from qpack.output import free_bytes, refuse_full_disk, refuse_inputs, resumable_directory
from qpack.packing import ConvertOptions, PackingJob, Progress
from qpack.policy import budget, modules
from qpack.sources import Source, open_source


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What `convert` did."""

    source_bytes: int
    """Bytes of the source's tensors."""
    resumed_bytes: int
    """How many of them an interrupted run had dealt with."""
    result: Inspection
    """What the packed directory holds: bits a weight and error of every tensor, and why what is kept is kept."""
    foreign: tuple[str, ...]
    """What stock transformers cannot load of it, in words; `qpack.load` can."""
    seconds: float


@dataclass(frozen=True, slots=True)
class DryRun:
    """What `convert` would do."""

    source_bytes: int
    """Bytes of the source's tensors."""
    plan: modules.Plan
    """What becomes of every tensor."""
    files: tuple[tuple[str, int], ...]
    """Name and size of every weight file."""
    config: Mapping[str, Any]
    """config.json of the result."""
    free_bytes: int
    """Room on the disk of the destination."""
    scratch_bytes: int
    """Room that shards of a hub model take meanwhile, where they are fetched one at a time."""
    read_rate: float | None
    """Bytes a second at which the source was read just now; None where it is not here yet."""

    @property
    def bytes(self) -> int:
        """Size of all weight files."""
        return sum(size for _, size in self.files)

    @property
    def fits_disk(self) -> bool:
        """Whether there is room for it."""
        return self.bytes + self.scratch_bytes <= self.free_bytes

    @property
    def packed_bits(self) -> float:
        """Bits a packed weight."""
        packed = [part for recipe in self.plan.recipes for part in recipe.parts if part.packing]
        bits = sum(budget.stored_bits(part.weights, part.packing) for part in packed)
        return bits / sum(part.weights for part in packed)

    @property
    def seconds(self) -> float | None:
        """How long reading the source takes at the measured rate, which is how long packing it takes."""
        return None if self.read_rate is None else self.source_bytes / self.read_rate


def convert(
    source: Path | str,
    destination: Path | str,
    options: ConvertOptions | None = None,
    *,
    revision: str | None = None,
    low_disk: bool = False,
    allow_pickle: bool = False,
    threads: int | None = None,
    force: bool = False,
    on_progress: Progress | None = None,
    **settings: Any,
) -> ConvertReport:
    """Pack the model ``source`` to NF4 and write it to the new directory ``destination``.

    ``source`` is a directory, a safetensors file or index, or a hub id (``revision``: its branch, tag or commit;
    ``low_disk``: fetch, pack and drop one shard at a time). ``settings`` are fields of `ConvertOptions`. The bytes
    written do not depend on ``threads`` (all cores by default). ``on_progress`` gets bytes of source done and in all.

    Interrupted by anything but bad input, it leaves nothing at ``destination`` but what the same call goes on with.

    Raises:
        CheckpointError: if the source is missing, malformed, of an unknown family, or has weights that are not finite.
        DataError: if the rules cannot be followed, or if ``target_bits`` are too few.
        DiskFullError: if the disk has no room.
        OutputExistsError: if ``destination`` exists and ``force`` is not set, or is, holds or lies in an input.
        ValueError: for illegal options.
    """
    start = time.monotonic()
    options = replace(options or ConvertOptions(), **settings)
    destination = Path(destination)
    inputs = _local(source)
    with resumable_directory(destination, force=force, marker=CONFIG_NAME, inputs=inputs) as work:
        opened = open_source(source, work=work.scratch, revision=revision, allow_pickle=allow_pickle, low_disk=low_disk)
        checkpoint = opened.checkpoint
        refuse_inputs(destination, opened.directories)
        job = PackingJob.prepare(opened, options)
        refuse_full_disk(destination, sum(size for _, size in _files(job)) + _peak(job))
        text = _inputs_text(opened, options)
        work.begin(text)
        job = job.spend_bits(threads=threads or 0, on_progress=on_progress)
        job.log()
        written = _core.pack(
            checkpoint.shards,
            work.directory,
            job.plan.recipes,
            mode=options.mode,
            quant_storage=options.quant_storage,
            inputs=text,
            max_shard_bytes=options.max_shard_bytes,
            threads=threads or 0,
            source=opened if opened.fetcher else None,
            on_progress=on_progress,
        )
        copy_companions(opened.companions, work.directory)
        write_config(work.directory, job.config())
        job.manifest(written).write(work.directory)
    return ConvertReport(
        source_bytes=checkpoint.tensor_bytes,
        resumed_bytes=written.resumed_bytes,
        result=inspect(destination),
        foreign=job.plan.foreign,
        seconds=time.monotonic() - start,
    )


def plan_conversion(
    source: Path | str,
    destination: Path | str,
    options: ConvertOptions | None = None,
    *,
    revision: str | None = None,
    low_disk: bool = False,
    allow_pickle: bool = False,
    **settings: Any,
) -> DryRun:
    """Do all that `convert` does before the first byte, write nothing, and say what it would do.

    With ``target_bits`` the sizes are those of ``blocksize`` and ``double_quant``: what the budget is spent on is known
    only when the weights have been read.

    Raises:
        CheckpointError, DataError, OutputExistsError, ValueError: as `convert`.
    """
    options = replace(options or ConvertOptions(), **settings)
    refuse_inputs(Path(destination), _local(source))
    with tempfile.TemporaryDirectory() as scratch:
        remote = not allow_pickle and not Path(source).exists()  # then headers are enough
        opened = open_source(
            source, work=Path(scratch), revision=revision, allow_pickle=allow_pickle, low_disk=low_disk or remote
        )
        refuse_inputs(Path(destination), opened.directories)
        job = PackingJob.prepare(opened, options)
        return DryRun(
            source_bytes=opened.checkpoint.tensor_bytes,
            plan=job.plan,
            files=tuple(_files(job)),
            config=job.config(),
            free_bytes=free_bytes(Path(destination)),
            scratch_bytes=_peak(job) if low_disk else 0,
            read_rate=None if opened.fetcher else _read_rate(opened.checkpoint.shards),
        )


def _local(source: Path | str) -> list[Path]:
    """The directory that a local source is in, which must not be written to."""
    path = Path(source)
    return [path if path.is_dir() else path.parent] if path.exists() else []


def _files(job: PackingJob) -> list[tuple[str, int]]:
    return _core.plan_pack(
        job.source.checkpoint.shards,
        job.plan.recipes,
        quant_storage=job.options.quant_storage,
        max_shard_bytes=job.options.max_shard_bytes,
    )


def _peak(job: PackingJob) -> int:
    """Bytes of fetched shards that lie on the disk at a time."""
    if not job.source.fetcher:
        return 0
    files = job.source.checkpoint.files
    steps = [{files[recipe.source], files[recipe.scale or recipe.source]} for recipe in job.plan.recipes]
    return job.source.peak_bytes([frozenset(step) for step in steps])


def _inputs_text(source: Source, options: ConvertOptions) -> str:
    """A text that changes with all that the output depends on: an interrupted run of another is not gone on with.

    Files are told apart by size and time of change, as make does; that their bytes are the same is not read again. What
    is fetched, or was unpickled, is told apart by its commit, or by the pickle.
    """
    checkpoint = source.checkpoint
    files = {} if source.fetcher else {shard.name: shard.stat() for shard in checkpoint.shards}
    text = {
        "version": _core.__version__,
        "options": options.record(),
        "source": source.name if source.revision else str(Path(source.name).resolve()),
        "revision": source.revision,
        "config": checkpoint.config,
        "files": {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in files.items()},
    }
    return json.dumps(text, sort_keys=True)


def _read_rate(shards: tuple[Path, ...]) -> float:
    """Bytes a second at which the largest of ``shards`` is read, over its first 256 MB, or half a second."""
    largest = max(shards, key=lambda shard: shard.stat().st_size)
    done = 0
    start = time.monotonic()
    with largest.open("rb", buffering=0) as file:
        while done < 256 << 20 and time.monotonic() - start < 0.5:
            piece = file.read(8 << 20)
            if not piece:
                break
            done += len(piece)
    return done / max(time.monotonic() - start, 1e-9)
