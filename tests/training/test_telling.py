"""What a run tells: metrics.jsonl, report.html with its samples, trackers, the terminal's panel and last line."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from qpack.cli import cli
from qpack.errors import TrainingError
from qpack.estimate import Device, Fit, Need
from qpack.sizes import format_size
from qpack.training import Event, StepLog, TrainSettings, train
from qpack.training.panel import Seen, draw, sparkline
from qpack.training.report import BatchHalved, EvalLog, Foreseen, RunBegin

SETTINGS = TrainSettings(
    r=8,
    lora_dropout=0.0,
    lr=3e-3,
    max_steps=40,
    batch_size=16,
    on_bad_row="skip",
    eval_steps=10,
    save_steps=10,
    samples=3,
    report_to=("tensorboard",),
)


class Stopped(Exception):
    """Ends a run like an interrupt does."""


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def flawed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The orders, and a row that cannot be used."""
    path = tmp_path_factory.mktemp("flawed") / "orders.jsonl"
    path.write_text(data.read_text() + '{"prompt": 1}\n')
    return path


@pytest.fixture(scope="module")
def told(base: Path, flawed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """The output of a run that was stopped in its middle and gone on with, and the events of both halves."""
    output = tmp_path_factory.mktemp("told") / "adapter"
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        resumed = any(isinstance(past, RunBegin) and past.step for past in events)
        if isinstance(event, StepLog) and event.step == 25 and not resumed:
            raise Stopped

    with pytest.raises(Stopped):
        train(base, flawed, output, SETTINGS, eval_data=flawed, on_event=listen)
    train(base, flawed, output, SETTINGS, eval_data=flawed, on_event=listen)
    return output, events


def test_metrics_hold_every_step_once(told: tuple[Path, list[Event]]) -> None:
    output, events = told
    found = [row for row in rows(output) if "loss" in row]
    assert [row["step"] for row in found] == list(range(1, 41))
    last = {event.step: event for event in events if isinstance(event, StepLog)}
    for row in found:
        step = last[row["step"]]
        assert (row["loss"], row["lr"], row["grad_norm"]) == (step.loss, step.lr, step.grad_norm)
        assert (row["tokens"], row["seconds"], row["memory"]) == (step.tokens, step.seconds, step.memory)
    assert sum(isinstance(event, StepLog) for event in events) == 25 + 20  # went on after step 20
    memory = [row["memory"] for row in found[:20]]
    assert memory == sorted(memory)
    assert memory[0] > 10**8  # of a process with torch in it


class Page(HTMLParser):
    """Collects what the page shows, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href") and str(value)[:1] != "#"]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_report_shows_curves_settings_and_samples(told: tuple[Path, list[Event]]) -> None:
    output, events = told
    page = Page()
    page.feed((output / "report.html").read_text())
    text = " ".join(page.text)
    assert page.tags.count("svg") == 3  # loss, learning rate and memory
    assert "script" not in page.tags
    assert page.loads == []
    *_, foreseen = [event.fit for event in events if isinstance(event, Foreseen)]
    assert re.search(rf"estimated before\s+{format_size(foreseen.need.bytes)}\s", text)
    assert re.search(r"measured\s+\d\S* [MG]B\s", text)
    assert "batch size" in text
    assert "examples" in text
    assert re.search(r"skipped rows\s+1\s", text)
    for index in (0, 5, 10):  # spread over the sixteen orders
        assert f"order {chr(97 + index)}" in text
        assert text.count(f"item {index}<|im_end|>") == 2  # as the data has it, and as the adapter answers


def test_tensorboard_has_every_step_once(told: tuple[Path, list[Event]]) -> None:
    output, _ = told
    logs = EventAccumulator(str(output / "runs")).Reload()
    expected = [row for row in rows(output) if "loss" in row]
    for tag, name in (("loss", "loss"), ("learning_rate", "lr"), ("memory", "memory")):
        shown = logs.Scalars(f"train/{tag}")
        assert [scalar.step for scalar in shown] == list(range(1, 41))
        assert [scalar.value for scalar in shown] == pytest.approx([row[name] for row in expected])
    evaluated = {row["step"]: row["eval_loss"] for row in rows(output) if "eval_loss" in row}
    shown = {scalar.step: scalar.value for scalar in logs.Scalars("eval/loss")}
    assert shown == pytest.approx(evaluated)


def test_a_tracker_that_is_not_installed_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpack.training.trackers.find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"^report_to: wandb is not installed; pip install wandb$"):
        train(tmp_path / "none", "none.jsonl", tmp_path / "adapter", TrainSettings(report_to=["wandb"]))


def test_the_last_line_counts_what_was_cut_and_skipped(base: Path, flawed: Path, tmp_path: Path) -> None:
    command = ["train", str(base), str(flawed), "-o", str(tmp_path / "adapter"), "--max-steps", "1", "--samples", "0"]
    done = CliRunner().invoke(cli, [*command, "--on-bad-row", "skip", "--max-length", "33"])
    assert done.exit_code == 0, done.output
    assert re.search(r"train: needs \S+ [MG]B \(weights .*\) of .* GB, memory free on this machine\n", done.output)
    assert done.output.index("train: needs") < done.output.index("train: step 1")
    assert ", 6 of 16 examples cut at max-length, 1 row skipped, in " in done.output


def test_samples_cost_nothing_when_none_are_asked_for(base: Path, data: Path, tmp_path: Path) -> None:
    train(base, data, tmp_path / "adapter", replace(SETTINGS, max_steps=1, eval_steps=None, samples=0, report_to=()))
    assert "Samples" not in (tmp_path / "adapter" / "report.html").read_text()


def test_panel_shows_the_run() -> None:
    seen = Seen()
    need = Need("train", {"weights": 5 * 10**9})
    seen(Foreseen(Fit(need, Device("a GPU", "cuda", 4 * 10**9), None, None, {"batch_size": 2, "grad_accum": 4})))
    seen(RunBegin(0, 200))
    for step in range(1, 101):
        seen(StepLog(step, 200, 4 - step / 50, 2e-4, 0.5, 2048, 1024.0, 2.0, 3 * 10**9))
    seen(EvalLog(100, 200, 2.25, True))
    seen(BatchHalved(100, 4, 2))
    shown = Console(file=io.StringIO(), width=100, record=True)
    shown.print(draw(seen))
    text = shown.export_text()
    for part in (
        "100 of 200",
        "loss",
        "2.000",
        "best 2.250 after step 100",
        "0.0002",
        "1,024",
        "3 GB",
        "3:20",
        "out of memory",
        "needs 5 GB (weights 5 GB) of 4 GB, a GPU: DOES NOT FIT; nearest",
        "--batch-size 2 --grad-accum 4",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([1.0], "▁"), ([2.0, 2.0], "▁▁"), ([8.0, 1.0], "█▁"), ([*map(float, range(8))], "▁▂▃▄▅▆▇█")],
)
def test_sparkline(values: list[float], drawn: str) -> None:
    assert sparkline(values) == drawn
    assert len(sparkline(values * 100)) == 40
