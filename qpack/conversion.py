"""Packing a checkpoint: a Hugging Face model in, a bitsandbytes NF4 model directory out.

The result loads in stock transformers, PEFT and vLLM. Where the source comes from is `qpack.sources`' matter, which
weights are packed and how `qpack.policy`'s. Rust does the arithmetic and the streaming, with a few chunks a thread in
memory whatever the size of the model. Everything that can be checked without the weights' data is checked before the
first byte is written; a run that is interrupted goes on with the same command.
"""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qpack import _core
from qpack.checkpoint import CONFIG_NAME
from qpack.companions import copy_companions, write_config
from qpack.errors import CheckpointError, DataError
from qpack.inspection import Inspection, inspect
from qpack.manifest import Manifest, WeightError
from qpack.output import free_bytes, refuse_full_disk, refuse_inputs, resumable_directory
from qpack.policy import budget, modules
from qpack.policy.plan import Packing
from qpack.policy.rules import Rules
from qpack.sizes import parse_size
from qpack.sources import Source, open_source

logger = logging.getLogger(__name__)

MODES = ("exact", "best")
QUANT_STORAGES = ("uint8", "bfloat16", "float16", "float32")

_TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

Progress = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to pack.

    Raises:
        ValueError: for a value that is not legal, naming it.
    """

    mode: str = "exact"
    """``exact``: codes and scales of bitsandbytes on a CPU. ``best``: the same format with less error, by searching the
    scales."""
    blocksize: int = 64
    """Weights per block scale."""
    double_quant: bool = True
    """Whether the block scales are themselves in 8 bits."""
    quant_storage: str = "uint8"
    """Element type that holds the codes; a float type for FSDP, which vLLM's plugin does not read."""
    rules: Path | str | None = None
    """TOML file of rules for single tensors, see `qpack.policy.rules`."""
    target_bits: float | None = None
    """Bits a weight, on average over the packed weights, to spend where the error is largest; ``blocksize`` and
    ``double_quant`` then are not used. Reads the source twice."""
    pack_lm_head: bool = False
    """Whether to pack the output embedding too, which vLLM does not read."""
    max_shard_size: int | str = "5GB"
    """Largest weight file to write."""

    def __post_init__(self) -> None:
        legal: dict[str, tuple[Any, ...]] = {
            "mode": MODES,
            "blocksize": _core.BLOCKSIZES,
            "quant_storage": QUANT_STORAGES,
        }
        for name, values in legal.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(map(str, values))}")
        parse_size(self.max_shard_size)

    @property
    def max_shard_bytes(self) -> int:
        """``max_shard_size`` as a number."""
        return parse_size(self.max_shard_size)

    def record(self) -> dict[str, Any]:
        """What ``qpack.json`` says of them: values alone, the rules by their text."""
        rules = None if self.rules is None else Path(self.rules).read_text(encoding="utf-8")
        return asdict(self) | {"rules": rules, "max_shard_size": self.max_shard_bytes}


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
        rules = None if options.rules is None else Rules.read(options.rules)
        plan = _plan(opened, options, rules)
        if options.target_bits is not None:
            _choose(opened, options, plan, None)  # refuses now what it would refuse after measuring
        refuse_full_disk(destination, sum(size for _, size in _files(opened, plan, options)) + _peak(opened, plan))
        text = _inputs_text(opened, options)
        work.begin(text)
        if options.target_bits is not None:
            plan = _spend(opened, options, rules, plan, threads=threads or 0, on_progress=on_progress)
        for recipe in plan.recipes:
            for part in recipe.parts:
                if part.packing:
                    logger.debug("pack %s %s in blocks of %d", part.name, part.shape, part.packing.blocksize)
                else:
                    logger.debug("keep %s %s: %s", part.name, part.shape, part.reason)
        written = _core.pack(
            checkpoint.shards,
            work.directory,
            plan.recipes,
            mode=options.mode,
            quant_storage=options.quant_storage,
            inputs=text,
            max_shard_bytes=options.max_shard_bytes,
            threads=threads or 0,
            source=opened if opened.fetcher else None,
            on_progress=on_progress,
        )
        copy_companions(opened.companions, work.directory)
        write_config(work.directory, _config(opened, plan, options))
        Manifest(
            version=_core.__version__,
            options=options.record(),
            source={
                "name": opened.name if opened.revision else Path(opened.name).resolve().name,
                "revision": opened.revision,
                "digest": written.source_fingerprint,
                "bytes": checkpoint.tensor_bytes,
                "tensors": len(checkpoint.tensors),
            },
            fingerprint=written.fingerprint,
            tensors=written.digests,
            errors={name: WeightError(*error) for name, error in written.errors.items()},
            kept=plan.kept,
            transposed=plan.transposed,
        ).write(work.directory)
    return ConvertReport(
        source_bytes=checkpoint.tensor_bytes,
        resumed_bytes=written.resumed_bytes,
        result=inspect(destination),
        foreign=plan.foreign,
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
        rules = None if options.rules is None else Rules.read(options.rules)
        plan = _plan(opened, options, rules)
        if options.target_bits is not None:
            _choose(opened, options, plan, None)  # refuses now what it would refuse after measuring
        return DryRun(
            source_bytes=opened.checkpoint.tensor_bytes,
            plan=plan,
            files=tuple(_files(opened, plan, options)),
            config=_config(opened, plan, options),
            free_bytes=free_bytes(Path(destination)),
            scratch_bytes=_peak(opened, plan) if low_disk else 0,
            read_rate=None if opened.fetcher else _read_rate(opened.checkpoint.shards),
        )


def _local(source: Path | str) -> list[Path]:
    """The directory that a local source is in, which must not be written to."""
    path = Path(source)
    return [path if path.is_dir() else path.parent] if path.exists() else []


def _plan(
    source: Source,
    options: ConvertOptions,
    rules: Rules | None,
    chosen: Mapping[str, Packing | None] | None = None,
) -> modules.Plan:
    return modules.plan(
        source.checkpoint,
        packing=Packing(options.blocksize, options.double_quant),
        rules=rules,
        pack_lm_head=options.pack_lm_head,
        chosen=chosen,
    )


def _spend(
    source: Source,
    options: ConvertOptions,
    rules: Rules | None,
    plan: modules.Plan,
    *,
    threads: int,
    on_progress: Progress | None,
) -> modules.Plan:
    """The plan that spends ``target_bits`` where the error is largest, after measuring every way to pack."""
    squares = _core.measure(
        source.checkpoint.shards,
        plan.recipes,
        budget.PACKINGS,
        threads=threads,
        source=source if source.fetcher else None,
        on_progress=on_progress,
    )
    return _plan(source, options, rules, _choose(source, options, plan, squares))


def _choose(
    source: Source, options: ConvertOptions, plan: modules.Plan, squares: Mapping[str, Sequence[float]] | None
) -> dict[str, Packing | None]:
    """How to store each group of weights, given the squared error of each way (None: only see whether any fits).

    Raises:
        DataError: if ``target_bits`` are too few for all.
    """
    assert options.target_bits is not None
    packed = [(recipe, part) for recipe in plan.recipes for part in recipe.parts if part.packing]
    weights = {part.name: part.weights for _, part in packed}
    wide = {part.name for recipe, part in packed if source.checkpoint.tensors[recipe.source].dtype == "F32"}
    candidates = {}
    for group, names in modules.groups(plan).items():
        kept = sum(budget.stored_bits(weights[name], None) * (2 if name in wide else 1) for name in names)
        # Experts in 16 bits are read by neither vLLM's plugin nor `qpack.load`.
        candidates[group] = [] if group.endswith(".experts") else [budget.Candidate(None, kept, 0.0)]
        for index, packing in enumerate(budget.PACKINGS):
            bits = sum(budget.stored_bits(weights[name], packing) for name in names)
            error = sum(squares[name][index] for name in names) if squares else 0.0
            candidates[group].append(budget.Candidate(packing, bits, error))
    try:
        return budget.choose(candidates, sum(weights.values()), options.target_bits)
    except ValueError as error:
        raise DataError(f"{source.name}: {error}") from None


def _files(source: Source, plan: modules.Plan, options: ConvertOptions) -> list[tuple[str, int]]:
    return _core.plan_pack(
        source.checkpoint.shards,
        plan.recipes,
        quant_storage=options.quant_storage,
        max_shard_bytes=options.max_shard_bytes,
    )


def _peak(source: Source, plan: modules.Plan) -> int:
    """Bytes of fetched shards that lie on the disk at a time."""
    if not source.fetcher:
        return 0
    placed = {info.name: shard for shard in source.checkpoint.shards for info in _core.read_header(shard)}
    steps = [{placed[recipe.source], placed[recipe.scale or recipe.source]} for recipe in plan.recipes]
    return source.peak_bytes([frozenset(step) for step in steps])


def _config(source: Source, plan: modules.Plan, options: ConvertOptions) -> dict[str, Any]:
    """config.json of the result: the source's, with transformers' `BitsAndBytesConfig` for what is written."""
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(
            part.packing.double_quant for recipe in plan.recipes for part in recipe.parts if part.packing
        ),
        "bnb_4bit_compute_dtype": _compute_dtype(source, plan),
        "bnb_4bit_quant_storage": options.quant_storage,
        "llm_int8_skip_modules": list(plan.skip_modules),
    }
    return dict(source.checkpoint.config) | {"quantization_config": quantization}


def _compute_dtype(source: Source, plan: modules.Plan) -> str:
    """The one float type of the weights that are packed, as decoded.

    Raises:
        CheckpointError: if they are of several.
    """
    tensors = source.checkpoint.tensors
    packed = [recipe for recipe in plan.recipes if any(part.packing for part in recipe.parts)]
    dtypes = {"BF16" if recipe.scale else tensors[recipe.source].dtype for recipe in packed}
    if len(dtypes) != 1:
        found = ", ".join(sorted(dtypes))
        raise CheckpointError(f"{source.checkpoint.directory}: layer weights are {found}, expected one type for all")
    return _TORCH_DTYPES[dtypes.pop()]


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
