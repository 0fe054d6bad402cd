"""Spending a number of bits where the error is largest: what stands behind ``--target-bits``.

Every group of weights that must be stored alike has candidates, each with its size and its squared error. Of these only
the lower convex hull of error over size is ever worth having. All groups start at their smallest candidate; then steps
along the hulls are taken in the order of error saved per bit, those that no longer fit passed over. That is the greedy
solution of the multiple-choice knapsack problem, which is at most one step from the best (Sinha and Zoltners, 1979).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qpack._core import BLOCKSIZES
from qpack.policy.plan import Packing

# Beside the codes of a packed weight: quant_map, nested_quant_map, and the JSON text of the state, which is shorter.
_MAP_BYTES, _NESTED_MAP_BYTES, _STATE_BYTES = 16 * 4, 256 * 4, 256
_NESTED_BLOCK = 256

PACKINGS = tuple(Packing(blocksize, nested) for blocksize in BLOCKSIZES for nested in (True, False))
"""Every way to pack a weight."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store the weights of a group."""

    packing: Packing | None
    """None keeps them in 16 bits."""
    bits: int
    """Size of all weights of the group, as from `stored_bits`."""
    error: float
    """Sum of the squared differences from the weights before packing, weighted or not; 0 if kept."""


def stored_bits(weights: int, packing: Packing | None) -> int:
    """Bits that a weight of ``weights`` elements takes at most: scales, maps and a generous state are included."""
    if packing is None:
        return weights * 16
    blocks = -(-weights // packing.blocksize)
    size = -(-weights // 2) + _MAP_BYTES + _STATE_BYTES
    if packing.double_quant:
        size += blocks + 4 * -(-blocks // _NESTED_BLOCK) + _NESTED_MAP_BYTES
    else:
        size += 4 * blocks
    return size * 8


def choose(groups: Mapping[str, Sequence[Candidate]], weights: int, target_bits: float) -> dict[str, Packing | None]:
    """Choose a candidate for every group, with the least error in all at most ``target_bits`` bits a weight.

    ``weights`` is the number of weights in all groups. Equal gains go by the order of the names, so that the result
    depends on nothing else.

    Raises:
        ValueError: if not even the smallest candidates fit, saying what they take; or if a group has no candidates.
    """
    budget = int(target_bits * weights)
    hulls = {name: _hull(name, groups[name]) for name in sorted(groups)}
    spent = sum(hull[0].bits for hull in hulls.values())
    if spent > budget:
        least = spent / weights
        raise ValueError(f"target is {target_bits:g} bits a weight, expected at least {least:.3f} for these weights")
    steps = [
        ((here.error - there.error) / (there.bits - here.bits), name, index + 1)
        for name, hull in hulls.items()
        for index, (here, there) in enumerate(pairwise(hull))
    ]
    reached = dict.fromkeys(hulls, 0)
    for _, name, index in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        hull = hulls[name]
        more = hull[index].bits - hull[index - 1].bits
        if reached[name] == index - 1 and spent + more <= budget:
            reached[name] = index
            spent += more
    return {name: hull[reached[name]].packing for name, hull in hulls.items()}


def _hull(name: str, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates worth their bits, smallest first: each step saves less error a bit than the one before."""
    if not candidates:
        raise ValueError(f"{name} has no candidates")
    hull: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda one: (one.bits, one.error)):
        if hull and candidate.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], candidate):
            hull.pop()
        hull.append(candidate)
    return hull


def _gain(here: Candidate, there: Candidate) -> float:
    return (here.error - there.error) / (there.bits - here.bits)
