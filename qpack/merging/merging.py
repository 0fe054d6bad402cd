"""Merging adapters into a model: a plain checkpoint that any tool reads, or one that is packed anew.

Each weight is what PEFT makes of it in f64, rounded once: of the packed base that the adapter was trained on, decoded
(``onto`` the base: what was trained is what you get), or of the original that the base was packed from (``original``).
The result is plain, or with ``to="nf4"`` packed as `qpack.convert` packs: from the sum of the original's weight and the
change, as f32. Never from a packed weight, where most codes would round to what they were and lose the adapter.

How every tensor is written is the matter of `qpack.merging.plain` and `qpack.merging.packed`. Rust reads, adds, rounds
and writes (`qpack._core.merge`).
"""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from qpack import _core
from qpack.adapters.adapter import Adapter
from qpack.adapters.changes import AnyChange, Change
from qpack.adapters.combining import CAT, Combination, Weighted, combine_factors, module_names
from qpack.adapters.origin import check_digest, check_likeness
from qpack.adapters.record import check_base, refuse_correction
from qpack.adapters.trained import Changes, changes
from qpack.checkpoint import CONFIG_NAME, Checkpoint
from qpack.companions import copy_companions, write_config
from qpack.errors import AdapterError, CheckpointError
from qpack.inspection import Inspection, inspect, kind_of, layer_of
from qpack.manifest import MANIFEST_NAME, Manifest, WeightError
from qpack.merging import packed, plain
from qpack.merging.card import write_card
from qpack.merging.effects import Effect, by_kind, measure_effects
from qpack.output import free_bytes, refuse_full_disk, refuse_inputs, resumable_directory
from qpack.packing import ConvertOptions, PackingJob, Progress
from qpack.policy.plan import Recipe
from qpack.sizes import parse_size

if TYPE_CHECKING:
    from qpack.merging.check import Check, Sample

logger = logging.getLogger(__name__)

TARGETS = ("plain", "nf4")
DTYPES = ("bfloat16", "float16", "float32")

Adapters: TypeAlias = Path | str | Sequence[tuple[Path | str, float]]
"""One adapter, or several with their weights."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What `merge` did."""

    merged: int
    """Number of tensors that the adapters changed."""
    effects: dict[str, Effect]
    """How much each weight was changed, by its name; those that were replaced as a whole are left out."""
    errors_of: Literal["base", "result"] | None
    """Whose quantization the errors are of: that of the base that the adapters were trained on, or, where it is packed,
    that of the result. None where none is recorded."""
    resumed_bytes: int
    """How many bytes of the source an interrupted run had dealt with."""
    result: Inspection
    """What the merged directory holds."""
    foreign: tuple[str, ...]
    """What stock transformers cannot load of it, in words; `qpack.load` can."""
    check: "Check | None"
    """How far its next tokens are from those of the base with the adapters; None if that was not asked for."""
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON can say it."""
        return {
            "directory": str(self.result.directory),
            "files": list(self.result.files),
            "bytes": self.result.bytes,
            "merged": self.merged,
            "foreign": list(self.foreign),
            "check": self.check and asdict(self.check),
            "errors_of": self.errors_of,
            "resumed_bytes": self.resumed_bytes,
            "seconds": self.seconds,
            "kinds": [
                {"name": kind, "count": len(found), **Effect.of_all(list(found.values())).as_json()}
                for kind, found in by_kind(self.effects).items()
            ],
            "weights": [
                {"name": name, "kind": kind_of(name), "layer": layer_of(name), **effect.as_json()}
                for name, effect in self.effects.items()
            ],
        }


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What `merge` would do."""

    merged: int
    """Number of tensors that the adapters change."""
    files: tuple[tuple[str, int], ...]
    """Name and size of every weight file."""
    free_bytes: int
    """Room on the disk of the destination."""

    @property
    def bytes(self) -> int:
        """Size of all weight files."""
        return sum(size for _, size in self.files)


@dataclass(frozen=True, slots=True)
class _Job:
    """All that is known before the first byte."""

    base: Checkpoint
    onto: Checkpoint
    adapters: Weighted
    combination: Combination
    applied: Weighted
    """The adapters whose changes are added up: all of them, or the one that they are combined to."""
    recipes: Sequence[Recipe]
    changes: Changes
    dtype: str
    max_shard_bytes: int
    packing: PackingJob | None
    """How the result is packed; None for a plain one."""

    @property
    def inputs(self) -> list[Path]:
        """The directories that are only read."""
        return [self.base.directory, self.onto.directory, *(adapter.path for adapter, _ in self.adapters)]

    @property
    def quant_storage(self) -> str:
        return self.packing.options.quant_storage if self.packing else "uint8"

    def parts(self) -> dict[str, list[str]]:
        """The names of what is made of each tensor."""
        return {recipe.source: [part.name for part in recipe.parts] for recipe in self.recipes}

    def spend_bits(self, *, threads: int, on_progress: Progress | None) -> "_Job":
        """With ``target_bits`` spent, as `PackingJob.spend_bits`, where the result is packed."""
        if not self.packing:
            return self
        packing = packed.with_changes(self.packing.spend_bits(threads=threads, on_progress=on_progress), self.changes)
        return replace(self, packing=packing, recipes=packing.plan.recipes)

    def files(self) -> list[tuple[str, int]]:
        return _core.plan_merge(
            self.onto.shards,
            self.recipes,
            self.changes.by_weight,
            quant_storage=self.quant_storage,
            max_shard_bytes=self.max_shard_bytes,
        )

    def text(self) -> str:
        """A text that changes with all that the output depends on, as `qpack.output.Work.begin` wants it."""
        files = [*self.onto.shards, *(adapter.weights_path for adapter, _ in self.adapters)]
        packing = self.packing and self.packing.options
        stats = {str(path.resolve()): path.stat() for path in files}
        text = {
            "version": _core.__version__,
            "dtype": self.dtype,
            "packing": packing and packing.record(),
            "max_shard_bytes": self.max_shard_bytes,
            "config": self.onto.config,
            "combination": asdict(self.combination),
            "adapters": [
                [str(adapter.path.resolve()), dict(adapter.config), weight] for adapter, weight in self.adapters
            ],
            "files": {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats.items()},
        }
        return json.dumps(text, sort_keys=True)


def merge(
    base: Path | str,
    adapters: Adapters,
    destination: Path | str,
    *,
    combination: Combination = CAT,
    original: Path | str | None = None,
    to: str = "plain",
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    check: Path | str | None = None,
    max_kl: float | None = None,
    threads: int | None = None,
    force: bool = False,
    on_progress: Progress | None = None,
    **settings: Any,
) -> MergeReport:
    """Write ``base`` with ``adapters`` merged in to the new directory ``destination``, as ``dtype`` (bfloat16).

    The base may be packed or plain; ``original`` is the checkpoint that it was packed from, to merge onto that instead.
    With ``to="nf4"`` the result is packed, which a packed base that is merged onto cannot be; ``settings`` are fields
    of `qpack.ConvertOptions`, where ``target_bits`` are spent by the errors of the weights before the change.
    ``check`` is a file of text on which the result is compared with the base and its adapters before it stands at
    ``destination``, see `qpack.merging.check`: it may diverge by ``max_kl``, by default 1e-4 where it is plain and
    merged onto the base, or twice what rounding alone does if that is more, else by anything.
    Of several adapters the changes are added up, each times its weight (PEFT's ``cat``), or what ``combination`` makes
    of them in f32 is merged. ``force`` replaces what is at ``destination``, and takes an adapter that was trained on
    another base. ``on_progress`` gets bytes of the source done and in all. Interrupted, the same call goes on; the
    bytes written do not depend on that, nor on ``threads``.

    Raises:
        CheckpointError: if the base or the original is malformed, or cannot be written as asked for.
        DataError: if the rules for packing cannot be followed, ``target_bits`` are too few, or ``check`` is no text.
        AdapterError: if an adapter is malformed, of a kind that cannot be merged or combined, or of another base.
        DiskFullError: if the disk has no room.
        MergeError: if the result diverges by more than it may; nothing is left of it.
        OutputExistsError: if ``destination`` exists and ``force`` is not set, or is or holds an input.
        ValueError: for an illegal option, a weight that is not finite, or a ``combination`` of one adapter.
    """
    start = time.monotonic()
    destination = Path(destination)
    options = _packing_options(to, dtype, max_shard_size, settings)
    if max_kl is not None and check is None:
        raise ValueError("max_kl is of a check, expected a text beside it")
    with _prepared(base, adapters, combination, original, dtype, max_shard_size, options, force=force) as job:
        sample = None if check is None else _sample(Path(check), job.base)
        with resumable_directory(destination, force=force, marker=CONFIG_NAME, inputs=job.inputs) as work:
            refuse_full_disk(destination, sum(size for _, size in job.files()))
            text = job.text()
            work.begin(text)
            job = job.spend_bits(threads=threads or 0, on_progress=on_progress)
            written = _core.merge(
                job.onto.shards,
                work.directory,
                job.recipes,
                job.changes.by_weight,
                mode=options.mode if options else "exact",
                quant_storage=job.quant_storage,
                inputs=text,
                max_shard_bytes=job.max_shard_bytes,
                threads=threads or 0,
                on_progress=on_progress,
            )
            if original is not None:
                paths = [adapter.path for adapter, _ in job.adapters]
                check_digest(job.base, paths, job.onto.directory, written.source_fingerprint, force=force)
            copy_companions(job.onto.directory, work.directory)
            write_config(work.directory, _config(job))
            stored = "packed" if job.packing else f"in {job.dtype}"
            write_card(work.directory, job.base, job.onto, job.adapters, job.combination, stored)
            if job.packing:
                packed.record(job.packing, written, job.adapters, job.combination).write(work.directory)
            checked = _check(job, sample, work.directory, max_kl) if sample else None
    result = inspect(destination)
    errors = _errors(destination if job.packing else job.base.directory)
    return MergeReport(
        merged=len(job.changes.by_weight),
        effects=measure_effects(written.changes, errors, job.parts()),
        errors_of=("result" if job.packing else "base") if errors else None,
        resumed_bytes=written.resumed_bytes,
        result=result,
        foreign=job.packing.plan.foreign if job.packing else (),
        check=checked,
        seconds=time.monotonic() - start,
    )


def plan_merge(
    base: Path | str,
    adapters: Adapters,
    destination: Path | str,
    *,
    combination: Combination = CAT,
    original: Path | str | None = None,
    to: str = "plain",
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    force: bool = False,
    **settings: Any,
) -> MergePlan:
    """Do all that `merge` does before the first byte, write nothing, and say what it would do.

    With ``target_bits`` the sizes are those of ``blocksize`` and ``double_quant``, as for `qpack.plan_conversion`.

    Raises:
        AdapterError, CheckpointError, DataError, OutputExistsError, ValueError: as `merge`.
    """
    options = _packing_options(to, dtype, max_shard_size, settings)
    with _prepared(base, adapters, combination, original, dtype, max_shard_size, options, force=force) as job:
        refuse_inputs(Path(destination), job.inputs)
        return MergePlan(len(job.changes.by_weight), tuple(job.files()), free_bytes(Path(destination)))


def open_adapters(adapters: Adapters, combination: Combination) -> Weighted:
    """Open and check the adapters that ``combination`` is to make one of.

    Raises:
        AdapterError: as `Adapter.open`.
        ValueError: for none, for one where the combination is of several, or for a weight that is not finite.
    """
    named = [(adapters, 1.0)] if isinstance(adapters, Path | str) else adapters
    if not named:
        raise ValueError("no adapter is given, expected at least one")
    if len(named) == 1 and combination.kind != "cat":
        raise ValueError(f"combine {combination.kind}: one adapter is given, expected several")
    for path, weight in named:
        if not math.isfinite(weight):
            raise ValueError(f"{path}: its weight is {weight}, expected a finite number")
    return tuple((Adapter.open(path), weight) for path, weight in named)


def _sample(text: Path, base: Checkpoint) -> "Sample":
    from qpack.merging.check import Sample  # imports torch

    return Sample(text, base)


def _check(job: _Job, sample: "Sample", merged: Path, max_kl: float | None) -> "Check":
    """Compare what is ``merged`` with the base and its adapters, and refuse it if it diverges by more than it may."""
    from qpack.merging.check import compare, require

    adapters = [(adapter.path, weight) for adapter, weight in job.applied]
    rounded_only = job.onto is job.base and not job.packing
    rounded = job.base.packed.keys() | job.changes.by_weight.keys() if rounded_only else ()
    found = compare(sample, job.base.directory, adapters, merged, rounded, job.dtype)
    limit = found.limit if max_kl is None else max_kl
    if limit is not None:
        require(found, limit)
    return found


def _packing_options(
    to: str, dtype: str | None, max_shard_size: int | str, settings: Mapping[str, Any]
) -> ConvertOptions | None:
    """How to pack the result; None for a plain one."""
    if to not in TARGETS:
        raise ValueError(f"to is {to!r}, expected one of {', '.join(TARGETS)}")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if to == "nf4":
        if dtype is not None:
            raise ValueError("dtype is of a plain result; a packed one keeps the types of the original")
        return ConvertOptions(max_shard_size=max_shard_size, **settings)
    if settings:
        raise ValueError(f"{', '.join(settings)}: of a packed result, expected to='nf4' beside it")
    return None


@contextmanager
def _prepared(
    base: Path | str,
    adapters: Adapters,
    combination: Combination,
    original: Path | str | None,
    dtype: str | None,
    max_shard_size: int | str,
    options: ConvertOptions | None,
    *,
    force: bool,
) -> Iterator[_Job]:
    """Open and check everything that can be checked without the weights' data.

    A combined adapter is there as long as the block lasts.
    """
    dtype = dtype or DTYPES[0]
    max_shard_bytes = parse_size(max_shard_size)
    checkpoint = Checkpoint.open(base)
    opened = open_adapters(adapters, combination)
    onto = checkpoint if original is None else Checkpoint.open(original)
    if original is not None and onto.packed:
        raise CheckpointError(f"{onto.directory}: is packed, expected the checkpoint that the base was packed from")
    if options is not None and onto.packed:
        why = "packed again, most of its codes would be what they were and the adapter lost"
        raise CheckpointError(f"{onto.directory}: is packed, and {why} (--onto original --source SRC)")
    check_base((adapter.path for adapter, _ in opened), checkpoint, force=force)
    if original is not None:
        check_likeness(checkpoint, onto, force=force)
        refuse_correction((adapter.path for adapter, _ in opened), force=force)
    turned = plain.transposed(onto)
    read_as = turned - set(onto.packed)  # packed weights lie as Linear's do
    found = [changes(adapter, onto, read_as, weight=weight, by_model=True) for adapter, weight in opened]
    with TemporaryDirectory(prefix="qpack-") as scratch:
        if combination.kind == "cat":
            applied = opened
            total = _sum(found, [adapter for adapter, _ in opened])
        else:  # what each one changes has been checked; in numbers only the combination counts
            applied = ((combine_factors(opened, combination, module_names(onto), Path(scratch)), 1.0),)
            total = changes(applied[0][0], onto, read_as, by_model=True)
        for name, change in total.by_weight.items():
            logger.debug("merge %s: %s", name, type(change).__name__)
        if options is not None:
            packing = packed.prepare_packing(onto, options)
            recipes = packed.with_changes(packing, total).plan.recipes
        else:
            packing = None
            new = total.by_weight.keys() - onto.weights.keys()  # an output embedding that was tied
            recipes = (*plain.recipes(onto, turned, dtype), *(packed.untied(onto, name, dtype) for name in new))
        yield _Job(checkpoint, onto, opened, combination, applied, recipes, total, dtype, max_shard_bytes, packing)


def _sum(found: list[Changes], adapters: list[Adapter]) -> Changes:
    """The changes of all adapters at once: low-rank ones add up, of all others there can be one."""
    total: dict[str, AnyChange] = {}
    for one, adapter in zip(found, adapters, strict=True):
        for name, change in one.by_weight.items():
            other = total.get(name)
            if other is None:
                total[name] = change
            elif isinstance(change, Change) and isinstance(other, Change) and not (change.magnitude or other.magnitude):
                total[name] = Change(other.terms + change.terms, of=other.of)
            else:
                raise AdapterError(f"{adapter.path}: changes {name}, which another adapter changes too, not by a sum")
    return Changes(total, untied=any(one.untied for one in found))


def _errors(directory: Path) -> Mapping[str, WeightError]:
    """How far each packed weight is from what it was packed from, where a ``qpack.json`` says so."""
    return Manifest.read(directory).errors if (directory / MANIFEST_NAME).is_file() else {}


def _config(job: _Job) -> dict[str, Any]:
    """config.json of the result: packed, or without quantization in one dtype; embeddings untied where they differ."""
    if job.packing:
        config = job.packing.config()
    else:
        config = {key: value for key, value in job.onto.config.items() if key != "quantization_config"}
        config.pop("torch_dtype", None)
        config["dtype"] = job.dtype
    if job.changes.untied:
        config["tie_word_embeddings"] = False
    return config
