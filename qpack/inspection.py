"""What a checkpoint holds: tensors, dtypes, sizes, bits a weight; and, where qpack packed it, errors and digests.

`inspect` reads headers, quant states and ``qpack.json``; `examine` goes through the codes and scales of one weight.
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qpack import _core
from qpack._core import SUFFIXES
from qpack.checkpoint import Checkpoint
from qpack.errors import CheckpointError
from qpack.manifest import MANIFEST_NAME, Manifest, WeightError

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_EXPERT = re.compile(r"\.((?:shared_)?experts?)\.(?:(\d+)\.)?(.+)")


def kind_of(name: str) -> str:
    """The role of the weight ``name`` in every layer: ``q_proj``, ``experts.up_proj``, ``norm``, ``q_proj.bias``."""
    path = name.removesuffix(".weight")
    if expert := _EXPERT.search(path):
        return f"{expert[1]}.{expert[3]}"
    *_, module = path.removesuffix(".bias").split(".")
    if "norm" in module:
        return "norm"
    return f"{module}.bias" if path.endswith(".bias") else module


def layer_of(name: str) -> int | None:
    """Index of the layer that the weight ``name`` is in, if in one."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def expert_of(name: str) -> int | None:
    """Index of the expert that the weight ``name`` is of, if of one."""
    found = _EXPERT.search(name)
    return int(found[2]) if found and found[2] else None


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One weight of the model. A packed one counts all its tensors."""

    name: str
    shape: tuple[int, ...]
    """As the model sees it: (out_features, in_features) for a packed weight."""
    dtype: str
    """safetensors' name of the dtype, or ``NF4``."""
    bytes: int
    blocksize: int | None = None
    """Weights per block scale, where packed."""
    double_quant: bool | None = None
    """Whether the block scales are in 8 bits, where packed."""
    error: WeightError | None = None
    """How far it is from what it was packed from, where ``qpack.json`` says so."""
    reason: str | None = None
    """Why it was not packed, where ``qpack.json`` says so."""

    @property
    def weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Bits a weight, scales and quant state included."""
        return self.bytes * 8 / self.weights if self.weights else 0.0

    @property
    def kind(self) -> str:
        """The role that the weight has in every layer, see `kind_of`."""
        return kind_of(self.name)

    @property
    def layer(self) -> int | None:
        """Index of the layer that it is in, if in one."""
        return layer_of(self.name)

    @property
    def expert(self) -> int | None:
        """Index of the expert that it is of, if of one."""
        return expert_of(self.name)


def _relative(tensors: Iterable[TensorReport]) -> float | None:
    """Norm of all differences over that of all weights, as if the tensors were one."""
    known = [tensor.error for tensor in tensors if tensor.error is not None]
    norm = math.hypot(*(error.norm for error in known))
    if not known:
        return None
    return math.hypot(*(error.relative * error.norm for error in known)) / norm if norm else 0.0


@dataclass(frozen=True, slots=True)
class Kind:
    """The weights of one kind that are stored in one way."""

    name: str
    """As `TensorReport.kind`."""
    dtype: str
    blocksize: int | None
    double_quant: bool | None
    tensors: tuple[TensorReport, ...]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The different shapes, most frequent first."""
        return tuple(shape for shape, _ in Counter(tensor.shape for tensor in self.tensors).most_common())

    @property
    def weights(self) -> int:
        """Number of weights in all."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes in all."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return self.bytes * 8 / self.weights if self.weights else 0.0

    @property
    def error(self) -> float | None:
        """Relative error of the tensors together; None where none is known."""
        return _relative(self.tensors)

    @property
    def worst(self) -> TensorReport | None:
        """The tensor with the largest relative error."""
        known = [tensor for tensor in self.tensors if tensor.error is not None]
        return max(known, key=lambda tensor: tensor.error.relative if tensor.error else 0.0, default=None)


@dataclass(frozen=True, slots=True)
class Inspection:
    """Every weight of a checkpoint, with sums over them."""

    directory: Path
    model_type: str
    files: tuple[str, ...]
    tensors: tuple[TensorReport, ...]
    manifest: Manifest | None = None
    """``qpack.json``, where there is one."""

    @property
    def weights(self) -> int:
        """Number of weights in all."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def bits(self) -> float:
        """Bits a weight over the whole model."""
        return self.bytes * 8 / self.weights if self.weights else 0.0

    @property
    def packed(self) -> tuple[TensorReport, ...]:
        """The NF4 weights."""
        return tuple(tensor for tensor in self.tensors if tensor.blocksize is not None)

    @property
    def packed_bits(self) -> float:
        """Bits a weight over the packed weights alone; 0 if there are none."""
        weights = sum(tensor.weights for tensor in self.packed)
        return sum(tensor.bytes for tensor in self.packed) * 8 / weights if weights else 0.0

    @property
    def error(self) -> float | None:
        """Relative error of all packed weights together; None where none is known."""
        return _relative(self.tensors)

    def by_dtype(self) -> dict[str, tuple[int, int, int]]:
        """Number of tensors, weights and bytes of each dtype, largest first."""
        count, weights, size = Counter[str](), Counter[str](), Counter[str]()
        for tensor in self.tensors:
            count[tensor.dtype] += 1
            weights[tensor.dtype] += tensor.weights
            size[tensor.dtype] += tensor.bytes
        return {dtype: (count[dtype], weights[dtype], total) for dtype, total in size.most_common()}

    def by_kind(self) -> tuple[Kind, ...]:
        """The weights by kind and storage, in the order in which a model of layers names them first."""
        groups: dict[tuple[str, str, int | None, bool | None], list[TensorReport]] = {}
        for tensor in sorted(self.tensors, key=lambda tensor: reading_order(tensor.name)):
            key = (tensor.kind, tensor.dtype, tensor.blocksize, tensor.double_quant)
            groups.setdefault(key, []).append(tensor)
        return tuple(Kind(*key, tuple(tensors)) for key, tensors in groups.items())

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON can say it."""
        sums = {name: getattr(self, name) for name in ("weights", "bytes", "bits", "packed_bits", "error")}
        head = {"directory": str(self.directory), "model_type": self.model_type, "files": list(self.files)}
        kinds = [
            {
                "name": kind.name,
                "dtype": kind.dtype,
                "blocksize": kind.blocksize,
                "double_quant": kind.double_quant,
                "count": len(kind.tensors),
                "shapes": [list(shape) for shape in kind.shapes],
                "weights": kind.weights,
                "bytes": kind.bytes,
                "bits": kind.bits,
                "error": kind.error,
                "worst": kind.worst.name if kind.worst else None,
            }
            for kind in self.by_kind()
        ]
        tensors = [
            asdict(tensor) | {"bits": tensor.bits, "kind": tensor.kind, "layer": tensor.layer}
            for tensor in self.tensors
        ]
        packed_by = None
        if self.manifest is not None:
            made = self.manifest
            packed_by = {"version": made.version, "options": dict(made.options), "source": dict(made.source)}
            packed_by["fingerprint"] = made.fingerprint
        return head | sums | {"qpack": packed_by, "kinds": kinds, "tensors": tensors}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    digest: str | None
    """As recorded in ``qpack.json``."""


@dataclass(frozen=True, slots=True)
class Examination:
    """One weight of the model in detail."""

    weight: TensorReport
    stored: tuple[Stored, ...]
    """The tensors that it is made of, codes first."""
    state: Mapping[str, Any] | None
    """dtype before packing and what the quant state says, where packed."""
    codes: tuple[int, ...] | None
    """How many weights have each of the 16 levels, ascending from -1 to 1, where packed."""
    scales: Mapping[str, float] | None
    """``smallest``, ``mean``, ``largest`` block scale as decoded, and how many are ``negative``, where packed."""

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON can say it."""
        return asdict(self) | {"weight": asdict(self.weight) | {"bits": self.weight.bits, "kind": self.weight.kind}}


def inspect(directory: Path | str) -> Inspection:
    """Read what the checkpoint in ``directory`` holds, from headers, quant states and ``qpack.json`` alone.

    Raises:
        CheckpointError: if it is not a model directory, or a file of it is malformed.
    """
    return _inspection(Checkpoint.open(directory))


def examine(directory: Path | str, name: str) -> Examination:
    """Read everything about the weight ``name`` of the checkpoint in ``directory``, its codes and scales too.

    Raises:
        CheckpointError: as `inspect`; naming the nearest names if there is no such weight.
    """
    checkpoint = Checkpoint.open(directory)
    inspection = _inspection(checkpoint)
    weight = next((tensor for tensor in inspection.tensors if tensor.name == name), None)
    if weight is None:
        raise CheckpointError(f"{checkpoint.directory}: no weight {name}{_hint(name, inspection)}")
    recorded = inspection.manifest.tensors if inspection.manifest else {}
    stored = tuple(
        Stored(part, checkpoint.files[part].name, info.dtype, info.shape, info.bytes, _digest(recorded, part))
        for part in (name, *(name + suffix for suffix in SUFFIXES))
        if (info := checkpoint.tensors.get(part)) is not None
    )
    packed = checkpoint.packed.get(name)
    if packed is None:
        return Examination(weight, stored, None, None, None)
    found = _core.weight_statistics(checkpoint.shards, name)
    state = {"dtype": packed.dtype, "blocksize": packed.blocksize, "double_quant": packed.double_quant}
    scales = {key: getattr(found, key) for key in ("smallest", "mean", "largest", "negative")}
    return Examination(weight, stored, state | {"shape": list(packed.shape)}, tuple(found.codes), scales)


def _inspection(checkpoint: Checkpoint) -> Inspection:
    manifest = Manifest.read(checkpoint.directory) if (checkpoint.directory / MANIFEST_NAME).exists() else None
    errors, kept = (manifest.errors, manifest.kept) if manifest else ({}, {})
    tensors = []
    for name, shape in checkpoint.weights.items():
        if weight := checkpoint.packed.get(name):
            how = (weight.bytes, weight.blocksize, weight.double_quant, errors.get(name))
            tensors.append(TensorReport(name, shape, "NF4", *how))
        else:
            info = checkpoint.tensors[name]
            tensors.append(TensorReport(name, shape, info.dtype, info.bytes, reason=kept.get(name)))
    return Inspection(
        directory=checkpoint.directory,
        model_type=str(checkpoint.config.get("model_type")),
        files=tuple(shard.name for shard in checkpoint.shards),
        tensors=tuple(tensors),
        manifest=manifest,
    )


_ORDER = (
    "embed_tokens", "wte", "wpe",
    "q_proj", "q_a_proj", "q_b_proj", "k_proj", "kv_a_proj_with_mqa", "kv_b_proj", "v_proj", "qkv_proj", "o_proj",
    "gate_proj", "up_proj", "gate_up_proj", "down_proj",
)  # fmt: skip
"""How people read a decoder layer; other kinds follow, then norms, then the output embedding."""


def reading_order(name: str) -> tuple[int, str, int]:
    """What to sort weights by, so that they stand by kind and layer."""
    kind, layer = kind_of(name), layer_of(name)
    last = {"norm": 1000, "lm_head": 1001}.get(kind, 500)
    return (_ORDER.index(kind) if kind in _ORDER else last, kind, -1 if layer is None else layer)


def _hint(name: str, inspection: Inspection) -> str:
    names = [tensor.name for tensor in inspection.tensors]
    parts = [weight for weight in names if any(name == weight + suffix for suffix in SUFFIXES)]
    near = parts or [weight for weight in names if name in weight][:3] or difflib.get_close_matches(name, names, 3)
    return f"; near it: {', '.join(near)}" if near else ""


def _digest(recorded: Mapping[str, str], name: str) -> str | None:
    return recorded[name].rsplit(" ", 1)[-1] if name in recorded else None
