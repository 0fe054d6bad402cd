"""Is a checkpoint what was packed? Every problem of a directory by file, tensor and weight.

With ``qpack.json``: every tensor's dtype, shape and bytes (BLAKE3) and the fingerprint are those recorded. With the
source too: every packed weight is decoded and compared with what it was packed from, and its error is the one recorded;
every kept tensor is its source, rounded once to the stored dtype. Without ``qpack.json``, for checkpoints made by
others, the structure alone: index, headers, quant states, block scales.

Nothing is repaired, and nothing stops at the first problem. Not covered: tokenizer and generation settings, which
people edit.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpack import _core
from qpack._core import SUFFIXES, TensorInfo
from qpack.checkpoint import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, Checkpoint, read_index, read_json_object
from qpack.errors import CheckpointError
from qpack.manifest import MANIFEST_NAME, Manifest, WeightError, describe
from qpack.policy import families, modules
from qpack.policy.plan import Packing
from qpack.sizes import format_size

_ROUNDING = 2.0**-16
"""How far a recorded error's square may be from the recomputed one. Packing takes it from three sums of products over a
block, in f32 (sum of x*x, x*level, level*level), which cancel; each is good to about 2**-18 of the block's own sum."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it should be. As a string: one line."""

    file: str
    """Name in the directory."""
    reason: str
    """What was expected and what was found."""
    tensor: str | None = None
    weight: str | None = None
    """The weight of the model that the tensor belongs to."""

    def __str__(self) -> str:
        of = f" (of {self.weight})" if self.weight not in (None, self.tensor) else ""
        return f"{self.file}: {f'tensor {self.tensor}{of}: ' if self.tensor else ''}{self.reason}"


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found."""

    directory: Path
    recorded: bool
    """Whether there is a ``qpack.json`` to verify against."""
    against: Path | None
    """The source that was compared."""
    files: tuple[str, ...]
    tensors: int
    bytes: int
    """Of all tensors."""
    fingerprint: str | None
    """As recomputed; None where a file could not be read."""
    errors: Mapping[str, WeightError]
    """Of every packed weight, recomputed from the source; empty without one."""
    problems: tuple[Problem, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def summary(self) -> str:
        """One line: what was checked, and what came of it."""
        held = f"{self.tensors} tensors, {format_size(self.bytes)}"
        if self.problems:
            return f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''} in {held}"
        checked = f"as recorded, fingerprint {self.fingerprint}" if self.recorded else "well formed"
        compared = f", and as packed from {self.against}" if self.against else ""
        unrecorded = "" if self.recorded else f" (no {MANIFEST_NAME}, so only the structure was checked)"
        return f"{held}: {checked}{compared}{unrecorded}, in {self.seconds:.1f} s"


def verify(
    directory: Path | str,
    *,
    against: Path | str | None = None,
    threads: int | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> Verification:
    """Check the checkpoint in ``directory``, and ``against`` the model that it was packed from.

    Reads everything once, a few chunks a thread in memory. ``on_progress`` gets bytes done and in
    all.

    Raises:
        CheckpointError: if ``directory`` is no directory, or the source is malformed or cannot be compared.
        OSError: if a file cannot be read.
    """
    start = time.monotonic()
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not a directory")
    source = None if against is None else Checkpoint.open(against)
    stored = _Stored(directory)
    progress = _Progress(on_progress, stored.bytes + (source.tensor_bytes if source else 0))
    digests = stored.digests(progress, threads or 0)
    if stored.manifest is not None:
        stored.check_manifest(stored.manifest, digests)
    stored.check_packed()
    stored.check_config()
    errors = stored.compare(source, progress, threads or 0) if source else {}
    return Verification(
        directory=directory,
        recorded=stored.manifest is not None,
        against=source.directory if source else None,
        files=tuple(path.name for path in stored.paths),
        tensors=len(stored.tensors),
        bytes=stored.bytes,
        fingerprint=_fingerprint(stored.tensors, digests) if stored.whole else None,
        errors=errors,
        problems=tuple(stored.problems),
        seconds=time.monotonic() - start,
    )


def _fingerprint(tensors: Mapping[str, TensorInfo], digests: Mapping[str, str]) -> str:
    return _core.fingerprint([(name, info.dtype, info.shape, digests[name]) for name, info in tensors.items()])


class _Progress:
    """One count over several calls that each report their own."""

    def __init__(self, on_progress: Callable[[int, int], object] | None, total: int) -> None:
        self._on_progress, self._total, self._before = on_progress, total, 0

    def run(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        done = 0

        def report(now: int, _total: int) -> None:
            nonlocal done
            done = now
            if self._on_progress is not None:
                self._on_progress(self._before + now, self._total)

        result = call(*arguments, **options, on_progress=report)
        self._before += done
        return result


class _Stored:
    """What stands in the directory, and the problems found so far."""

    def __init__(self, directory: Path) -> None:
        """Read index, headers and ``qpack.json``."""
        self.directory = directory
        self.problems: list[Problem] = []
        self.paths: list[Path] = []
        """The weight files that can be read."""
        self.tensors: dict[str, TensorInfo] = {}
        self.files: dict[str, str] = {}
        """File of every tensor."""
        self.whole = True
        """Whether every weight file could be read and no name occurs twice."""
        self.missing: set[str] = set()
        """Tensors that were reported as missing, by themselves or with their file."""
        self.broken: set[str] = set()
        """Packed weights that cannot be decoded."""
        self.root = INDEX_NAME if (directory / INDEX_NAME).exists() else SINGLE_NAME
        """The file that knows all tensors."""
        self.manifest = self._read_manifest()
        placed = self._read_index()
        if placed is not None:
            files = sorted(set(placed.values()))
        elif self.root == INDEX_NAME:  # which cannot be used
            files = sorted(path.name for path in directory.glob("*.safetensors"))
        else:
            files = [SINGLE_NAME]
        for file in files:
            self._read_file(file, [name for name, place in (placed or {}).items() if place == file])
        if self.manifest is not None:
            for path in sorted(directory.glob("*.safetensors")):
                if path.name not in files:
                    self._report(path.name, "is no file of this checkpoint")
        self._check_index(placed)

    @property
    def bytes(self) -> int:
        """Of all tensors that were found."""
        return sum(info.bytes for info in self.tensors.values())

    @property
    def packed(self) -> set[str]:
        """Names of the weights that have a quant state."""
        return {name.removesuffix(SUFFIXES[-1]) for name in self.tensors if name.endswith(SUFFIXES[-1])}

    def digests(self, progress: "_Progress", threads: int) -> dict[str, str]:
        """Digest of every tensor that was found."""
        found = progress.run(_core.digest_tensors, self.paths, threads=threads)
        return {name: digest for path, name, digest in found if self.files[name] == path.name}

    def check_manifest(self, manifest: Manifest, digests: Mapping[str, str]) -> None:
        """Compare with what ``qpack.json`` says."""
        before = len(self.problems)
        for name, recorded in manifest.tensors.items():
            if name in self.tensors:
                self._check_tensor(name, recorded, digests[name])
            elif name not in self.missing:
                self.missing.add(name)
                self._report(self.root, f"no file holds it, but {MANIFEST_NAME} records it", name)
        for name, file in self.files.items():
            if name not in manifest.tensors:
                self._report(file, f"is not recorded in {MANIFEST_NAME}", name)
        # A tensor that differs changes the fingerprint too, which would say nothing new.
        if len(self.problems) == before and self.whole:
            found = _fingerprint(self.tensors, digests)
            if found != manifest.fingerprint:
                self._report(MANIFEST_NAME, f"fingerprint is {manifest.fingerprint}, that of the tensors is {found}")
        self._check_roles(manifest)

    def check_packed(self) -> None:
        """Check that packed weights can be decoded."""
        try:
            broken = _core.broken_weights(self.paths)
        except CheckpointError:
            if self.whole:
                raise
            return  # a name in two files, which was reported
        for weight, path, reason in broken:
            self.broken.add(weight)
            if not any(weight + suffix in self.missing for suffix in ("", *SUFFIXES)):
                self.problems.append(Problem(path.name, reason, None, weight))

    def check_config(self) -> None:
        """Check that ``config.json`` says how the packed weights are to be read."""
        try:
            config = read_json_object(self.directory / CONFIG_NAME)
        except CheckpointError as error:
            self._report_error(CONFIG_NAME, error)
            return
        if not self.packed:
            return
        quantization = config.get("quantization_config")
        if not isinstance(quantization, Mapping):
            self._report(CONFIG_NAME, "has no quantization_config, but there are packed weights")
            return
        expected: dict[str, object] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
        }
        for key, value in expected.items():
            if (found := quantization.get(key)) != value:
                self._report(CONFIG_NAME, f"quantization_config has {key} {found!r}, expected {value!r}")

    def compare(self, source: Checkpoint, progress: "_Progress", threads: int) -> dict[str, WeightError]:
        """Compare with ``source``; the error of every packed weight."""
        if not self.whole:
            return {}
        plan = self._plan(source)
        made = {part.name for recipe in plan.recipes for part in recipe.parts}
        for name in sorted(self.tensors.keys() - made):
            if _weight_of(name) == name:
                self._report(self.files[name], f"{source.directory} has nothing that it was made from", name)
        found = progress.run(_core.compare_packed, self.paths, source.shards, plan.recipes, threads=threads)
        recorded = self.manifest.source.get("digest") if self.manifest else None
        if recorded not in (None, found.source_fingerprint):
            there = f"those of {source.directory} have {found.source_fingerprint}"
            self._report(MANIFEST_NAME, f"was packed from tensors with digest {recorded}, {there}")
        errors = {name: WeightError(*error) for name, error in found.errors.items()}
        for name in sorted(found.errors):
            self._check_error(name, errors[name])
        for name, index in sorted(found.differences.items()):
            reason = f"is not what {source.directory} has{self._cast(name, source)}, from flat index {index} on"
            self._report(self.files[name], reason, name)
        for name, reason in sorted(found.problems.items()):
            if name in self.broken or name in self.missing:
                continue
            if name not in self.files:
                self._report(self.root, f"no file holds it, but {source.directory} does", name)
                continue
            file = self.files[name]
            self.problems.append(Problem(file, reason.removeprefix(f"{self.directory / file}: "), None, name))
        return errors

    def _plan(self, source: Checkpoint) -> modules.Plan:
        """How ``source`` was packed, going by what is packed here and what is not."""
        packed = self.packed
        head = f"{families.OUTPUT_EMBEDDING}.weight" in packed
        plan = modules.plan(source, packing=Packing(), pack_lm_head=head)
        kept = {
            group: None for group, names in modules.groups(plan).items() if not any(name in packed for name in names)
        }
        return modules.plan(source, packing=Packing(), pack_lm_head=head, chosen=kept) if kept else plan

    def _cast(self, name: str, source: Checkpoint) -> str:
        original = source.tensors.get(name)
        return (
            f" rounded to {self.tensors[name].dtype}" if original and original.dtype != self.tensors[name].dtype else ""
        )

    def _read_manifest(self) -> Manifest | None:
        if not (self.directory / MANIFEST_NAME).exists():
            return None
        try:
            return Manifest.read(self.directory)
        except CheckpointError as error:
            self._report_error(MANIFEST_NAME, error)
            return None

    def _read_index(self) -> dict[str, str] | None:
        """File of every tensor, where there is an index that can be used."""
        if self.root != INDEX_NAME:
            return None
        try:
            return read_index(self.directory / INDEX_NAME)
        except CheckpointError as error:
            self._report_error(INDEX_NAME, error)
            return None

    def _read_file(self, file: str, expected: Sequence[str]) -> None:
        path = self.directory / file
        if not path.is_file():
            self.whole = False
            self.missing.update(expected)
            what = f", but {INDEX_NAME} places {len(expected)} tensors in it" if expected else ""
            self._report(file, f"no such file{what}")
            return
        try:
            infos = _core.read_header(path)
        except CheckpointError as error:
            self.whole = False
            self.missing.update(expected)
            self._report_error(file, error)
            return
        self.paths.append(path)
        for info in infos:
            if info.name in self.tensors:
                self.whole = False
                self._report(file, f"is in {self.files[info.name]} too", info.name)
            else:
                self.tensors[info.name] = info
                self.files[info.name] = file

    def _check_index(self, placed: Mapping[str, str] | None) -> None:
        if placed is None:
            return
        for name, file in placed.items():
            found = self.files.get(name)
            if found != file and name not in self.missing:
                self.missing.update([name] if found is None else [])
                self._report(INDEX_NAME, f"places it in {file}, but {found or 'no file'} holds it", name)
        for name, holder in self.files.items():
            if name not in placed:
                self._report(INDEX_NAME, f"does not place it, but {holder} holds it", name)

    def _check_roles(self, manifest: Manifest) -> None:
        """Check that an error is recorded for what is packed, and only for that."""
        packed = self.packed
        for name in sorted(packed - manifest.errors.keys() - self.missing):
            self._report(MANIFEST_NAME, "is packed, but no error is recorded for it", name)
        for name in sorted((manifest.errors.keys() - packed) - self.missing):
            self._report(MANIFEST_NAME, "is recorded with an error, but it is not packed", name)
        for name in sorted(manifest.kept.keys() & packed):
            self._report(MANIFEST_NAME, "is recorded as kept, but it is packed", name)

    def _check_tensor(self, name: str, recorded: str, digest: str) -> None:
        found = describe(self.tensors[name], digest)
        if found == recorded:
            return
        (header, digest), (recorded_header, recorded_digest) = _split(found), _split(str(recorded))
        if header != recorded_header:
            self._report(self.files[name], f"is {header}, recorded {recorded_header}", name)
        if digest != recorded_digest:
            self._report(self.files[name], f"bytes have digest {digest}, recorded {recorded_digest}", name)

    def _check_error(self, name: str, found: WeightError) -> None:
        recorded = self.manifest.errors.get(name) if self.manifest else None
        if recorded is None:
            return
        for what in ("relative", "worst"):
            ours, theirs = getattr(found, what), getattr(recorded, what)
            if not abs(ours**2 - theirs**2) <= _ROUNDING:
                file = self.files[name]
                self._report(file, f"{what} error against the source is {ours:.6f}, recorded {theirs:.6f}", name)

    def _report(self, file: str, reason: str, tensor: str | None = None) -> None:
        self.problems.append(Problem(file, reason, tensor, _weight_of(tensor) if tensor else None))

    def _report_error(self, file: str, error: CheckpointError) -> None:
        """Report an error that names the file by its path, as they all do."""
        self._report(file, str(error).removeprefix(f"{self.directory / file}: "))


def _weight_of(tensor: str) -> str:
    """The weight of the model that ``tensor`` is, or stands beside."""
    return next((tensor.removesuffix(suffix) for suffix in SUFFIXES if tensor.endswith(suffix)), tensor)


def _split(line: str) -> tuple[str, str]:
    header, _, digest = line.rpartition(" ")
    return header, digest
