"""An interrupted run that is begun again ends with the adapter of a run that was never interrupted, to the bit."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import contents, finish, kill

from qpack.training import TrainSettings

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA kernels sum in no fixed order")

BASE = TrainSettings(r=4, lora_dropout=0.1, lr=1e-3, batch_size=2, epochs=2.0, save_steps=2)
"""Two epochs of eight steps; dropout draws random numbers in each, so a state that is off by one draw shows."""

PLUS = replace(BASE, loraplus_lr_ratio=4.0)
"""LoRA+, whose optimizers have more groups of parameters."""


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (replace(BASE, optim="paged_adamw_8bit"), 16),  # its unpaged twin, on a CPU
        (replace(PLUS, optim="paged_adamw_32bit", lr_scheduler="cosine", warmup_steps=3, weight_decay=0.1), 16),
        (replace(PLUS, optim="adamw_torch", grad_accum=3, lr_scheduler="linear"), 6),  # 3 does not divide the epoch
        # Two of the twelve sequences that are not held out fit in a pack.
        (
            replace(PLUS, optim="adamw_8bit", packing=True, max_length=70, batch_size=1, eval_split=0.25, eval_steps=4),
            12,
        ),
    ],
    ids=lambda value: f"{value.optim}-{value.lr_scheduler}" if isinstance(value, TrainSettings) else str(value),
)
def test_killed_and_resumed_it_is_the_same_adapter(
    base: Path, data: Path, tmp_path: Path, settings: TrainSettings, steps: int
) -> None:
    finish(base, data, tmp_path / "whole", settings)
    moments = random.Random(settings.optim)
    first, second = sorted(moments.sample(range(2, steps - 1), 2))
    kill(base, data, tmp_path / "resumed", settings, first, delay=0)
    kill(base, data, tmp_path / "resumed", settings, second, delay=moments.uniform(0, 0.02))
    assert not (tmp_path / "resumed").exists()
    assert finish(base, data, tmp_path / "resumed", settings) >= first - 2
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed", "whole"]
