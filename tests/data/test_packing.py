"""Packing: every sequence once, no group too long, and as full as TRL's."""

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from datasets import Dataset  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from trl.data_utils import pack_dataset

from qpack.data import pack


@given(st.lists(st.integers(1, 37), max_size=200), st.integers(37, 64))
def test_every_sequence_is_in_one_group_that_holds_it(lengths: list[int], capacity: int) -> None:
    groups = pack(lengths, capacity)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in group) for group in groups]
    assert all(0 < total <= capacity for total in sums)
    # Two groups that would fit in one are never left apart.
    assert not sums or sum(sorted(sums)[:2]) > capacity or len(sums) == 1
    assert pack(lengths, capacity) == groups


@given(st.lists(st.integers(1, 37), min_size=1, max_size=60))
def test_the_fit_is_the_best(lengths: list[int]) -> None:
    """Against the definition, said plainly."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else 40) - length)
    assert len(pack(lengths, 40)) == len(rooms)


def test_no_more_groups_than_trl(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = [1 + (index * index * 7919) % 900 for index in range(2000)]
    rows = pa.array([[0] * length for length in lengths], pa.list_(pa.int32()))
    theirs = pack_dataset(Dataset(pa.table({"input_ids": rows})), 1024, "bfd")
    assert len(pack(lengths, 1024)) <= len(theirs)


@pytest.mark.parametrize("length", [0, 9])
def test_length_that_fits_nowhere_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=rf"^lengths\[1\]: expected 1 to 8, found {length}$"):
        pack([8, length], 8)
