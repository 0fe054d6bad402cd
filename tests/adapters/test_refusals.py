"""What stock PEFT can write, and what qpack does with it: each kind and each setting is read, idle or refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils.peft_types import PeftType
from safetensors.torch import save_file

import qpack
from qpack.errors import AdapterError

READ = {
    "alpha_pattern",
    "bias",
    "ensure_weight_tying",
    "init_lora_weights",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}
WHERE = {
    "exclude_modules",
    "fan_in_fan_out",
    "layers_pattern",
    "layers_to_transform",
    "megatron_config",
    "megatron_core",
    "target_modules",
}
"""Which modules got factors, and how their weights lie: the tensors and the base say it too."""
OF_TRAINING = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
REFUSED: dict[str, Any] = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2], [1, 2]],
    "lora_bias": True,
    "monteclora_config": {"num_samples": 4},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"rank": 1},
}


def write(directory: Path, **settings: Any) -> Path:
    """A plain adapter, but for ``settings``."""
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]} | settings
    (directory / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 256), f"{name}.lora_B.weight": torch.ones(256, 2)}
    save_file(factors, directory / "adapter_model.safetensors")
    return directory


def test_every_setting_of_peft_is_known() -> None:
    """Fails when PEFT gets a setting that nobody has thought about."""
    assert {field.name for field in dataclasses.fields(LoraConfig)} == READ | WHERE | OF_TRAINING | REFUSED.keys()


@pytest.mark.parametrize("name", sorted({str(kind.value) for kind in PeftType} - {"LORA"}))
def test_other_kinds_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=rf"adapter: peft_type is '{name}', expected 'LORA'"):
        qpack.Adapter.open(write(tmp_path / "adapter", peft_type=name))


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_no_change_of_weights_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=rf"adapter: {name} is .*, which is no change of the base's weights"):
        qpack.Adapter.open(write(tmp_path / "adapter", **{name: REFUSED[name]}))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"])
def test_beginnings_that_change_the_base_are_refused(init: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"init_lora_weights is '{init}', which changes the base too"):
        qpack.Adapter.open(write(tmp_path / "adapter", init_lora_weights=init))


def test_all_others_are_opened(tmp_path: Path) -> None:
    idle = dict.fromkeys(REFUSED) | {"init_lora_weights": "gaussian", "lora_dropout": 0.1}
    assert qpack.Adapter.open(write(tmp_path / "adapter", **idle)).rank == 2
