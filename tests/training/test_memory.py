"""Memory that runs out in a pass: the batch is halved, and the run learns what it would have learned.

A GPU that is too small is not at hand on every machine, so a hook raises what torch raises there.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qpack.training.model
from qpack.errors import TrainingError
from qpack.training import Event, StepLog, TrainSettings, train
from qpack.training.report import BatchHalved

SETTINGS = TrainSettings(r=4, lora_dropout=0.0, lr=1e-3, max_steps=4, batch_size=4, grad_accum=2, samples=0)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let no pass but the first take more than so many sequences: the first leaves gradients of a step behind."""
    load = qpack.training.model.load_base

    def limited(rows: int) -> None:
        passes = 0

        def run_out(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal passes
            passes += 1
            if passes > 1 and len(kwargs["input_ids"]) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        def load_limited(*args: Any, **kwargs: Any) -> Any:
            model = load(*args, **kwargs)
            model.register_forward_pre_hook(run_out, with_kwargs=True)
            return model

        monkeypatch.setattr(qpack.training.model, "load_base", load_limited)

    return limited


def test_halved_batch_learns_the_same(base: Path, data: Path, tmp_path: Path, limit: Callable[[int], None]) -> None:
    events: list[Event] = []
    train(base, data, tmp_path / "whole", SETTINGS, on_event=events.append)
    limit(2)
    halved: list[Event] = []
    train(base, data, tmp_path / "halved", SETTINGS, on_event=halved.append)
    assert [event for event in halved if isinstance(event, BatchHalved)] == [BatchHalved(1, 2, 4)]
    expected, found = ([event for event in log if isinstance(event, StepLog)] for log in (events, halved))
    assert [step.loss for step in found] == pytest.approx([step.loss for step in expected], rel=5e-3)
    assert [step.grad_norm for step in found] == pytest.approx([step.grad_norm for step in expected], rel=5e-2)
    assert [step.tokens for step in found] == [step.tokens for step in expected]


def test_one_sequence_that_does_not_fit_ends_the_run(
    base: Path, data: Path, tmp_path: Path, limit: Callable[[int], None]
) -> None:
    limit(0)
    with pytest.raises(TrainingError, match=r"^out of memory in step 1 with one sequence at a time; lower max_length "):
        train(base, data, tmp_path / "adapter", replace(SETTINGS, batch_size=2))
    assert not (tmp_path / "adapter").exists()
