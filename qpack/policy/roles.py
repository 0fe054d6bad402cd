"""What a tensor of a checkpoint is to the model: the words that the ways to find out have in common.

`families` tells it from names, `structure` from the model that transformers builds; `modules` turns
it into a plan. A tensor without a role is kept, and `why_kept` says what it is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

ROUTER = "router"
OUTPUT = "output embedding"
PROJECTOR = "projector"
TOWERS = frozenset({"vision tower", "audio tower", PROJECTOR})
"""What is outside the text tower of a multimodal model."""
PLAIN_SUBCLASSES = frozenset({"FalconLinear"})
"""Subclasses of ``nn.Linear`` that are one by another name. They are packed like it, and `qpack.load` takes them for
one; transformers loads the class itself only."""


@dataclass(frozen=True, slots=True)
class Linear:
    """The weight of an ``nn.Linear`` or ``Conv1D``, (out_features, in_features)."""

    module: str
    """Its name in transformers' model."""
    transpose: bool = False
    """Whether it is stored as (in_features, out_features)."""
    keep: str = ""
    """Why it is kept unless something else is asked for; empty if it is packed."""
    foreign: str = ""
    """Name of the class, if transformers does not take it for an ``nn.Linear`` and so cannot load it packed."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Weights or biases of routed experts."""

    module: str
    """Name of all experts of a layer in transformers' model: ``model.layers.0.mlp.experts``."""
    outputs: tuple[str, ...] = ()
    """Names to give to the parts of one expert, in the order of their rows, with ``*`` for its number:
    ``model.layers.0.mlp.experts.*.gate_proj.weight``. None if the tensor is of one expert, (out_features, in_features),
    and keeps its name; else it is of all, with one more dimension in front."""
    transpose: bool = False
    """Whether a matrix is stored as (in_features, out_features)."""
    interleaved: bool = False
    """Whether the rows of the parts alternate; else one part follows the other."""
    keep: str = ""


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that is never packed, and whose module nothing else may pack."""

    module: str
    """Its name in transformers' model."""
    reason: str


Role = Linear | Experts | Kept


def is_transposed(role: Role | None) -> bool:
    """Whether 16-bit checkpoints have it as (in_features, out_features)."""
    return isinstance(role, Linear | Experts) and role.transpose


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What is known of a model: the roles of its stored tensors, and its output embedding, stored or not."""

    roles: Mapping[str, Role]
    """By the name of the tensor; what is not there has no role."""
    output: str
    """Name of the output embedding's module; empty if the model has none."""
    tied: bool
    """Whether the output embedding is the input embedding."""
    unstored: frozenset[str]
    """Linear modules without a tensor of their own: tied, or made from another's."""
    names: Mapping[str, str] = field(default_factory=dict)
    """New names of tensors that are stored under names that only transformers knows."""


_ROUTER = re.compile(r"(?P<block>(?:.+?\.)?)(gate|router|shared_expert_gate)(\..+)?")
_EMBEDDING = re.compile(r"embed|\bw[tp]e\b")
_NORM = re.compile(r"norm|\bln_|\.ln\d")


def router_block(module: str) -> str | None:
    """The name, up to and with its last dot, of the block in which ``module`` chooses among experts, going by its name.

    None if it is not called as a router, or as what weighs the shared expert.
    """
    match = _ROUTER.fullmatch(module)
    return match["block"] if match else None


def why_kept(name: str, shape: tuple[int, ...]) -> str:
    """What the tensor ``name`` without a role is."""
    if _NORM.search(name):
        return "norm"
    if name.endswith("bias") and len(shape) < 3:
        return "bias"
    if _EMBEDDING.search(name):
        return "input embedding"
    if len(shape) < 2:
        return "vector"
    if "conv" in name:
        return "convolution"
    return "no weight of a Linear of this model"
