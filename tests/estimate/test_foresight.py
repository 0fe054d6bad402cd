"""What a run says of itself before its first step is about the data as it is."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from qpack.training import TrainSettings
from qpack.training.distributed import Processes
from qpack.training.foresight import foresee

ROWS = [{"input_ids": [1] * length} for length in (40, 30, 20)]
PAIRS = [{"chosen": row, "rejected": {"input_ids": [1] * 50}} for row in ROWS]


@pytest.mark.parametrize(
    ("changes", "examples", "purpose"),
    [
        ({}, ROWS, "3 x 40"),
        ({"max_length": 32, "batch_size": 2}, ROWS, "2 x 32"),
        ({"packing": True}, ROWS, "1 x 90"),
        ({"packing": True, "max_length": 60}, ROWS, "2 x 60"),
        ({"method": "dpo"}, PAIRS, "3 x 2 x 50"),
    ],
    ids=str,
)
def test_lengths_and_batches_are_those_of_the_data(
    packed: Path, changes: dict[str, Any], examples: list[Any], purpose: str
) -> None:
    found = foresee(packed, TrainSettings(**changes), examples, Processes())
    assert found
    assert found.need.purpose == f"train r=16 on {purpose} tokens"


def test_a_sequence_that_has_a_row_for_itself_needs_no_mask(packed: Path) -> None:
    """Packed or not: 40 and 30 tokens find no room beside each other in 60, but 40 and 20 do."""

    def activations(packing: bool, rows: list[Any]) -> int:
        found = foresee(packed, TrainSettings(packing=packing, batch_size=1, max_length=60), rows, Processes())
        assert found
        return found.need.parts["activations"]

    assert activations(True, ROWS[:2]) == activations(False, ROWS[:2])
    assert activations(True, ROWS) > activations(False, [{"input_ids": [1] * 60}])


def test_shapes_that_cannot_be_read_are_no_reason_not_to_train(
    packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(packed, tmp_path / "other")
    config = json.loads((packed / "config.json").read_text())
    config["n_embd"] = config.pop("hidden_size")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        assert foresee(tmp_path / "other", TrainSettings(), ROWS, Processes()) is None
    assert caplog.messages == ["no estimate of the memory: config.json: has no hidden_size, which the sizing needs"]
