"""What is held out is evaluated by the token, changes nothing of the training, and decides which adapter is kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from qpack.data import DataOptions, encode, read
from qpack.errors import DataError
from qpack.loading.model import load
from qpack.loading.tokenizer import load_tokenizer
from qpack.training import EvalLog, Event, StepLog, TrainReport, TrainSettings, train
from qpack.training.batches import collate
from qpack.training.compute import Compute

FLOAT32 = Compute("cpu", torch.float32)
SETTINGS = TrainSettings(r=4, lora_dropout=0.1, lr=3e-3, batch_size=3, max_steps=8, eval_steps=3, samples=0)


def evaluations(events: list[Event]) -> list[EvalLog]:
    return [event for event in events if isinstance(event, EvalLog)]


def loss_of(adapter: Path, base: Path, data: Path) -> float:
    """The mean over tokens, of all sequences in one batch, by stock PEFT."""
    rows = encode(read(data), load_tokenizer(base), base, DataOptions(), 1024)
    batch = collate(rows.examples[:])
    model: Any = PeftModel.from_pretrained(load(base, dtype=torch.float32), adapter).eval()
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        return float(model(**inputs).loss)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same orders with answers that are like those learned only in part, and of very different lengths."""
    path = tmp_path_factory.mktemp("data") / "other.jsonl"
    lines = [{"prompt": f"order {chr(97 + index)}", "completion": f"item {'no ' * index}"} for index in range(7)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def run(base: Path, data: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainReport, Any]:
    """A run of which the loss on what is held out falls, and then rises as the orders are learned by heart.

    In float32: in bfloat16 the curve of so hasty a run is decided by rounding.
    """
    events: list[Event] = []
    settings = replace(SETTINGS, lr=1e-2, max_steps=60, early_stopping=2)
    output = tmp_path_factory.mktemp("evaluated") / "adapter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qpack.training.compute.choose_compute", lambda: FLOAT32)
        return train(base, data, output, settings, eval_data=other, on_event=events.append), events


def test_the_best_adapter_is_kept_and_its_loss_is_the_mean_over_tokens(
    run: tuple[TrainReport, list[Event]], base: Path, other: Path
) -> None:
    report, events = run
    logs = evaluations(events)
    best = min(logs, key=lambda log: log.loss)
    assert (report.best_step, report.best_eval_loss) == (best.step, best.loss)
    assert best.best
    # Seven sequences in batches of three there, in one here: sums in another order.
    assert loss_of(report.output, base, other) == pytest.approx(best.loss, rel=1e-4)
    assert loss_of(report.output, base, other) < logs[-1].loss - 0.05


def test_it_stops_when_nothing_has_been_better_for_long_enough(run: tuple[TrainReport, list[Event]]) -> None:
    report, events = run
    assert report.best_step is not None
    assert report.steps == report.best_step + 2 * 3 < 60
    assert [log.step for log in evaluations(events)] == list(range(3, report.steps + 1, 3))


def test_evaluating_changes_nothing_of_the_training(base: Path, data: Path, tmp_path: Path) -> None:
    without = train(base, data, tmp_path / "without", replace(SETTINGS, eval_steps=None))
    events: list[Event] = []
    evaluated = train(base, data, tmp_path / "evaluated", SETTINGS, eval_data=data, on_event=events.append)
    assert [log.step for log in evaluations(events)] == [3, 6, 8]
    assert evaluated.best_step == 8  # or another adapter were kept
    weights = "adapter_model.safetensors"
    kept, expected = load_file(evaluated.output / weights), load_file(without.output / weights)
    assert all(torch.equal(kept[name], expected[name]) for name in expected)


def test_a_share_is_held_out_by_whole_rows(base: Path, data: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    settings = replace(SETTINGS, max_steps=None, eval_split=0.25, batch_size=4)
    report = train(base, data, tmp_path / "adapter", settings, on_event=events.append)
    assert report.examples == 12
    assert sum(isinstance(event, StepLog) for event in events) == 3
    record = json.loads((report.output / "qpack_adapter.json").read_text())
    assert record["data"]["examples"] == 12
    assert record["data"]["held_out"]["examples"] == 4


def test_what_cannot_be_evaluated_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    with pytest.raises(DataError, match="early_stopping: nothing is held out"):
        train(base, data, output, TrainSettings(early_stopping=1))
    with pytest.raises(DataError, match="eval_steps: nothing is held out"):
        train(base, data, output, TrainSettings(eval_steps=1))
    with pytest.raises(DataError, match="eval_split: expected no evaluation data beside it, found both"):
        train(base, data, output, TrainSettings(eval_split=0.5), eval_data=data)
    with pytest.raises(DataError, match="eval_split: expected more than 0 and less than 1, found 1"):
        TrainSettings(eval_split=1)
    assert not output.exists()
