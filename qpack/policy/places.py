"""Where a checkpoint holds what the model in transformers has under another name, or in another number of tensors.

::

    model.layers.0.mlp.experts.3.w1                  Mixtral's block_sparse_moe.experts.3.w1, as the model names it
    model.layers.0.mlp.experts.3.gate_proj           rows of experts.gate_up_proj, where that holds all of a layer
    model.layers.0.mlp.experts.gate_up_proj          gate_proj and up_proj of every expert, where these stand alone

Adapters name what they change as the model does that they were trained on: `qpack.load` has packed experts one by one,
transformers has all of a layer in one parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from qpack.checkpoint import Checkpoint
from qpack.policy.modules import read_roles
from qpack.policy.roles import Experts

_FUSED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""What stands one below the other in transformers' parameters of all experts, by the names that single ones have."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of a checkpoint, or rows of it."""

    name: str
    rows: tuple[int, int] | None = None
    """First row and the one after the last, seen as a matrix whose columns are the last dimension; None for all."""
    interleaved: bool = False
    """Whether it is no range of rows: columns, of a tensor of all experts that lies transposed."""


@dataclass(frozen=True, slots=True)
class Places:
    """Of one checkpoint."""

    weights: Mapping[str, Place]
    """By the name of a module's weight in the model, one expert a module."""
    parameters: Mapping[str, tuple[tuple[str, ...], ...]]
    """By the name of a parameter of all experts: for each expert the weights that make its rows."""


def find_places(checkpoint: Checkpoint) -> Places:
    """Find all of them, of single weights too where names are the same.

    Raises:
        CheckpointError: for a model that transformers does not know, or that lacks weights.
    """
    weights: dict[str, Place] = {}
    single: dict[str, dict[int, dict[str, str]]] = {}
    for name, role in read_roles(checkpoint).items():
        if not isinstance(role, Experts):
            weights[f"{role.module}.weight"] = Place(name)
        elif not role.outputs:
            number, leaf = name.removesuffix(".weight").rsplit(".", 2)[1:]
            weights[f"{role.module}.{number}.{leaf}.weight"] = Place(name)
            single.setdefault(role.module, {}).setdefault(int(number), {})[leaf] = name
        elif len(shape := checkpoint.weights[name]) == 3:
            weights |= _of_all(name, shape, role)
    parameters = {
        f"{module}.{parameter}": tuple(tuple(experts[number][leaf] for leaf in leaves) for number in sorted(experts))
        for module, experts in single.items()
        for parameter, variants in _FUSED.items()
        for leaves in variants
        if leaves[0] in experts[0]
    }
    return Places(weights, parameters)


def _of_all(name: str, shape: tuple[int, ...], role: Experts) -> dict[str, Place]:
    """The single experts in a tensor of all of them."""
    experts, rows, _ = shape
    places = {}
    for expert in range(experts):
        for index, output in enumerate(role.outputs):
            leaf = output.removesuffix(".weight").rpartition(".")[2]
            parts = 1 if role.transpose else len(role.outputs)
            height = rows // parts
            first = expert * rows + (0 if role.transpose else index * height)
            interleaved = role.interleaved or (role.transpose and len(role.outputs) > 1)
            place = Place(name, (first, first + height), interleaved)
            places[output.replace("*", str(expert))] = places[f"{role.module}.{expert}.{leaf}.weight"] = place
    return places
