"""LoRA+: what a step did to A and B, with each optimizer. (Resumed to the bit: test_interrupted.py.)"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qpack.training import TrainSettings, train

RATIO = 8.0
PLAIN = TrainSettings(r=4, lora_dropout=0.0, lr=1e-3, max_steps=2, samples=0)
PLUS = replace(PLAIN, loraplus_lr_ratio=RATIO)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_a_step_moves_b_so_many_times_as_far(optim: str, base: Path, data: Path, tmp_path: Path) -> None:
    def adapter(settings: TrainSettings) -> dict[str, torch.Tensor]:
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        train(base, data, output, replace(settings, optim=optim))
        return load_file(output / "adapter_model.safetensors")

    plain, plus = (adapter(replace(settings, max_steps=1)) for settings in (PLAIN, PLUS))
    later = adapter(PLUS)
    for name, tensor in plus.items():
        if "lora_B" in name:  # was zero; the first step of Adam is as long as the rate
            assert tensor.abs().max() == pytest.approx(RATIO * PLAIN.lr, rel=1e-3)
            torch.testing.assert_close(tensor, RATIO * plain[name], rtol=1e-5, atol=0)
        else:  # with B at zero A had no gradient
            assert torch.equal(tensor, plain[name])
            assert 0 < (later[name] - tensor).abs().max() <= PLAIN.lr
