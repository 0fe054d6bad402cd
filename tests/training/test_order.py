"""In which order sequences come: by seed and epoch alone, those of like length together, the longest of all first."""

import random

import pytest

from qpack.training.batches import Order

LENGTHS = random.Random(0).choices(range(10, 1000), k=240)


@pytest.mark.parametrize("group_size", [1, 8])
def test_each_comes_once_in_an_order_of_seed_and_epoch_alone(group_size: int) -> None:
    order = Order(LENGTHS, group_size, seed=3)
    first = [*order]
    assert sorted(first) == [*range(len(LENGTHS))]
    assert [*order] == first
    order.epoch = 1
    second = [*order]
    assert second != first
    again = Order(LENGTHS, group_size, seed=3)
    again.epoch = 1
    assert [*again] == second  # what a resumed run meets
    assert [*Order(LENGTHS, group_size, seed=4)] != first


def test_little_is_padded_and_the_longest_comes_first() -> None:
    def padded(order: Order) -> int:
        lengths = [LENGTHS[index] for index in order]
        steps = [lengths[begin : begin + 8] for begin in range(0, len(lengths), 8)]
        return sum(8 * max(step) - sum(step) for step in steps)

    grouped = Order(LENGTHS, 8, seed=0)
    assert padded(grouped) < 0.25 * padded(Order(LENGTHS, 1, seed=0))
    assert LENGTHS[next(iter(grouped))] == max(LENGTHS)
