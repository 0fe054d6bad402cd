"""How a checkpoint is packed: what can be asked for, the plan and the config.json that follow, and their record.

Converting packs a source as it is; merging packs one that adapters change on the way. Both do it by these functions.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qpack import _core
from qpack.errors import CheckpointError, DataError
from qpack.manifest import Manifest, WeightError
from qpack.policy import budget, modules
from qpack.policy.plan import Packing
from qpack.policy.rules import Rules
from qpack.sizes import parse_size
from qpack.sources import Source

logger = logging.getLogger(__name__)

MODES = ("exact", "best")
QUANT_STORAGES = ("uint8", "bfloat16", "float16", "float32")

TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Torch's names of the float types, by safetensors'."""

Progress = Callable[[int, int], object]
"""Is called with bytes done and in all."""


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
class PackingJob:
    """A source, and how it is to be packed."""

    source: Source
    options: ConvertOptions
    rules: Rules | None
    plan: modules.Plan

    @classmethod
    def prepare(cls, source: Source, options: ConvertOptions) -> "PackingJob":
        """Plan, with ``blocksize`` and ``double_quant`` where `spend_bits` will choose others.

        Raises:
            CheckpointError: if the source is of an unknown family, or not to be packed.
            DataError: if the rules cannot be followed, or ``target_bits`` are too few.
        """
        rules = None if options.rules is None else Rules.read(options.rules)
        job = cls(source, options, rules, _plan(source, options, rules, {}))
        if options.target_bits is not None:
            job._choose(None)  # refuses now what it would refuse after measuring
        return job

    def spend_bits(self, *, threads: int, on_progress: Progress | None) -> "PackingJob":
        """Where ``target_bits`` are asked for, the plan that spends them where the error is largest.

        Reads the source, to measure every way to pack.
        """
        if self.options.target_bits is None:
            return self
        squares = _core.measure(
            self.source.checkpoint.shards,
            self.plan.recipes,
            budget.PACKINGS,
            threads=threads,
            source=self.source if self.source.fetcher else None,
            on_progress=on_progress,
        )
        return replace(self, plan=_plan(self.source, self.options, self.rules, self._choose(squares)))

    def log(self) -> None:
        """Tell what becomes of every tensor."""
        for recipe in self.plan.recipes:
            for part in recipe.parts:
                if part.packing:
                    logger.debug("pack %s %s in blocks of %d", part.name, part.shape, part.packing.blocksize)
                else:
                    logger.debug("keep %s %s: %s", part.name, part.shape, part.reason)

    def config(self) -> dict[str, Any]:
        """config.json of the result: the source's, with transformers' `BitsAndBytesConfig` for what is written."""
        packings = [part.packing for recipe in self.plan.recipes for part in recipe.parts if part.packing]
        quantization = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": any(packing.double_quant for packing in packings),
            "bnb_4bit_compute_dtype": self._compute_dtype(),
            "bnb_4bit_quant_storage": self.options.quant_storage,
            "llm_int8_skip_modules": list(self.plan.skip_modules),
        }
        return dict(self.source.checkpoint.config) | {"quantization_config": quantization}

    def manifest(self, written: _core.Written, **source: Any) -> Manifest:
        """The record of what was ``written``; ``source`` is added to what it says of the source."""
        checkpoint = self.source.checkpoint
        about = {
            "name": self.source.name if self.source.revision else Path(self.source.name).resolve().name,
            "revision": self.source.revision,
            "digest": written.source_fingerprint,
            "bytes": checkpoint.tensor_bytes,
            "tensors": len(checkpoint.tensors),
        }
        return Manifest(
            version=_core.__version__,
            options=self.options.record(),
            source=about | source,
            fingerprint=written.fingerprint,
            tensors=written.digests,
            errors={name: WeightError(*error) for name, error in written.errors.items()},
            kept=self.plan.kept,
            transposed=self.plan.transposed,
        )

    def _choose(self, squares: Mapping[str, Sequence[float]] | None) -> dict[str, Packing | None]:
        """How to store each group of weights, given the squared error of each way (None: only see whether any fits).

        Raises:
            DataError: if ``target_bits`` are too few for all.
        """
        assert self.options.target_bits is not None
        tensors = self.source.checkpoint.tensors
        packed = [(recipe, part) for recipe in self.plan.recipes for part in recipe.parts if part.packing]
        weights = {part.name: part.weights for _, part in packed}
        wide = {part.name for recipe, part in packed if tensors[recipe.source].dtype == "F32"}
        candidates = {}
        for group, names in modules.groups(self.plan).items():
            kept = sum(budget.stored_bits(weights[name], None) * (2 if name in wide else 1) for name in names)
            # Experts in 16 bits are read by neither vLLM's plugin nor `qpack.load`.
            candidates[group] = [] if group.endswith(".experts") else [budget.Candidate(None, kept, 0.0)]
            for index, packing in enumerate(budget.PACKINGS):
                bits = sum(budget.stored_bits(weights[name], packing) for name in names)
                error = sum(squares[name][index] for name in names) if squares else 0.0
                candidates[group].append(budget.Candidate(packing, bits, error))
        try:
            return budget.choose(candidates, sum(weights.values()), self.options.target_bits)
        except ValueError as error:
            raise DataError(f"{self.source.name}: {error}") from None

    def _compute_dtype(self) -> str:
        """The one float type of the weights that are packed, as decoded.

        Raises:
            CheckpointError: if they are of several.
        """
        checkpoint = self.source.checkpoint
        packed = [recipe for recipe in self.plan.recipes if any(part.packing for part in recipe.parts)]
        dtypes = {"BF16" if recipe.scale else checkpoint.tensors[recipe.source].dtype for recipe in packed}
        if len(dtypes) != 1:
            found = ", ".join(sorted(dtypes))
            raise CheckpointError(f"{checkpoint.directory}: layer weights are {found}, expected one type for all")
        return TORCH_DTYPES[dtypes.pop()]


def _plan(
    source: Source, options: ConvertOptions, rules: Rules | None, chosen: Mapping[str, Packing | None]
) -> modules.Plan:
    return modules.plan(
        source.checkpoint,
        packing=Packing(options.blocksize, options.double_quant),
        rules=rules,
        pack_lm_head=options.pack_lm_head,
        chosen=chosen,
    )
