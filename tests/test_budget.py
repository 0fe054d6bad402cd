"""Choosing settings for a number of bits: never over it, least error, the same whatever the order."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qpack
from qpack.policy.budget import PACKINGS, Candidate, choose, stored_bits
from qpack.policy.plan import Packing


def gaussian(weights: int, scale: float) -> list[Candidate]:
    """Candidates whose errors grow with the blocksize as those of Gaussian weights do, about as log B."""
    return [Candidate(None, stored_bits(weights, None), 0.0)] + [
        Candidate(
            packing,
            stored_bits(weights, packing),
            scale * weights * (0.004 + 0.001 * np.log2(packing.blocksize) + 1e-5 * packing.double_quant),
        )
        for packing in PACKINGS
    ]


def total(groups: dict[str, list[Candidate]], choice: dict[str, Packing | None]) -> tuple[int, float]:
    """Bits and error of a choice."""
    taken = [next(one for one in groups[name] if one.packing == packing) for name, packing in choice.items()]
    return sum(one.bits for one in taken), sum(one.error for one in taken)


@pytest.mark.parametrize("target", [4.1, 4.2, 4.5, 5.0, 8.0, 16.0])
def test_bits_go_where_the_error_is_largest(target: float) -> None:
    sizes = {"a": 1 << 20, "b": 1 << 22, "c": 1 << 21}
    groups = {name: gaussian(size, scale) for (name, size), scale in zip(sizes.items(), (4.0, 1.0, 0.25), strict=True)}
    choice = choose(groups, sum(sizes.values()), target)
    bits, error = total(groups, choice)
    assert bits <= target * sum(sizes.values())
    if target == 16.0:
        assert choice == dict.fromkeys(groups)
    else:
        assert error > 0
        # At one setting for all that fits, the error is no smaller.
        for packing in PACKINGS:
            same = total(groups, dict.fromkeys(groups, packing))
            assert same[0] > target * sum(sizes.values()) or same[1] >= error


def test_the_more_bits_the_less_error_and_the_order_does_not_matter() -> None:
    draw = random.Random(0)
    groups = {f"group {index}": gaussian(1 << draw.randrange(14, 22), draw.random()) for index in range(40)}
    weights = sum(group[0].bits // 16 for group in groups.values())
    errors = []
    for target in np.linspace(4.2, 9.0, 25):
        choice = choose(groups, weights, float(target))
        shuffled = {name: draw.sample(groups[name], len(groups[name])) for name in reversed(groups)}
        assert choose(shuffled, weights, float(target)) == choice
        errors.append(total(groups, choice)[1])
    # Greedy may pass over a large step that a few more bits would have allowed, and take small ones.
    largest = max(candidate.error for group in groups.values() for candidate in group)
    assert all(after <= before + largest for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0] / 2


candidates = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 1000)), min_size=1, max_size=5, unique_by=lambda pair: pair[0]
)


@given(st.lists(candidates, min_size=1, max_size=4), st.integers(1, 120))
def test_greedy_is_at_most_one_step_from_the_best(drawn: list[list[tuple[int, int]]], budget: int) -> None:
    groups = {
        str(index): [Candidate(Packing(number), bits, float(error)) for number, (bits, error) in enumerate(pairs)]
        for index, pairs in enumerate(drawn)
    }
    fitting = [
        combination for combination in itertools.product(*groups.values()) if sum(c.bits for c in combination) <= budget
    ]
    if not fitting:
        with pytest.raises(ValueError, match="expected at least"):
            choose(groups, 1, budget)
        return
    bits, error = total(groups, choose(groups, 1, budget))
    assert bits <= budget
    best = min(sum(candidate.error for candidate in combination) for combination in fitting)
    step = max(a.error - b.error for group in groups.values() for a in group for b in group)
    assert best <= error <= best + step


def test_equal_gains_go_by_name() -> None:
    pair = [Candidate(Packing(64), 10, 5.0), Candidate(Packing(32), 12, 1.0)]
    for names in (("a", "b"), ("b", "a")):
        assert choose(dict.fromkeys(names, pair), 1, 23) == {"a": Packing(32), "b": Packing(64)}


def test_what_cannot_be_had_is_refused() -> None:
    groups = {"a": gaussian(1 << 20, 1.0)}
    with pytest.raises(ValueError, match=r"target is 4 bits a weight, expected at least 4\.0\d\d for these weights"):
        choose(groups, 1 << 20, 4.0)
    with pytest.raises(ValueError, match="a has no candidates"):
        choose({"a": []}, 1, 8.0)


def test_sizes_are_those_of_real_files(llama: Path, tmp_path: Path) -> None:
    """At most what is reckoned, and no more than the rounding of the state's JSON text less."""
    for packing in (Packing(32, False), Packing(64), Packing(4096)):
        report = qpack.convert(
            llama, tmp_path / "packed", blocksize=packing.blocksize, double_quant=packing.double_quant, force=True
        )
        for weight in report.result.packed:
            reckoned = stored_bits(weight.weights, packing) // 8
            assert weight.bytes <= reckoned <= weight.bytes + 200
    assert stored_bits(10, None) == 160
