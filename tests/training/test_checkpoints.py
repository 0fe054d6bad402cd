"""Checkpoints are whole or not there, and as many of them stay as are to be kept, the best one beside."""

from pathlib import Path

import pytest

from qpack.training.checkpoints import Checkpoints


def save(checkpoints: Checkpoints, step: int) -> None:
    with checkpoints.saving() as directory:
        (directory / f"checkpoint-{step}").mkdir()
        (directory / f"checkpoint-{step}" / "state").write_text(str(step))


def test_the_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "saved", keep=2)
    assert (checkpoints.steps(), checkpoints.latest()) == ([], None)
    for step in (5, 10, 15, 100):
        save(checkpoints, step)
        checkpoints.drop_old(best=5)
    assert checkpoints.steps() == [5, 15, 100]
    assert checkpoints.latest() == checkpoints.path(100)
    checkpoints.drop_old(best=None)
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["checkpoint-100", "checkpoint-15"]


def test_what_was_not_finished_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 5)
    with pytest.raises(KeyboardInterrupt), checkpoints.saving() as directory:
        (directory / "checkpoint-10").mkdir()
        raise KeyboardInterrupt
    assert checkpoints.latest() == checkpoints.path(5)
    save(checkpoints, 10)  # what is left of the other is in no one's way
    assert checkpoints.steps() == [5, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]


def test_one_that_is_there_is_replaced(tmp_path: Path) -> None:
    """By a run that went on from an earlier one and took another way."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 5)
    (checkpoints.path(5) / "old").touch()
    save(checkpoints, 5)
    assert [path.name for path in checkpoints.path(5).iterdir()] == ["state"]
