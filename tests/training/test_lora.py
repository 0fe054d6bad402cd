"""LoRA in its variants: what is adapted, at which rank and scale, that it learns in float32, and that PEFT reads it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import qpack
from qpack.errors import CheckpointError, DataError, TrainingError
from qpack.training import TrainSettings, train
from qpack.training.settings import checkpointing

SETTINGS = TrainSettings(r=4, lora_dropout=0.0, lr=1e-2, max_steps=2, batch_size=8, optim="adamw_torch", samples=0)

VARIANTS = {
    "names": replace(SETTINGS, target_modules="q_proj,down_proj"),
    "regex": replace(SETTINGS, target_modules=r".*layers\.1\.mlp\.(up|gate)_proj"),
    "patterns": replace(SETTINGS, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 6}, alpha_pattern={"v_proj": 8}),
    "rslora": replace(SETTINGS, use_rslora=True),
    "dora": replace(SETTINGS, use_dora=True),
    "checkpointing": replace(SETTINGS, gradient_checkpointing=True),
}


@pytest.fixture(scope="module")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The adapter of each variant, after two steps."""
    folder = tmp_path_factory.mktemp("variants")
    runs = VARIANTS | {"plain": SETTINGS}
    return {name: train(base, data, folder / name, settings).output for name, settings in runs.items()}


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model.model.layers."): tensor
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }


def modules(adapter: Path) -> set[str]:
    return {name.partition(".lora_")[0] for name in weights(adapter)}


def test_targets(trained: dict[str, Path]) -> None:
    assert modules(trained["names"]) == {
        f"{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert modules(trained["regex"]) == {"1.mlp.up_proj", "1.mlp.gate_proj"}
    assert len(modules(trained["plain"])) == 14


def test_ranks(trained: dict[str, Path]) -> None:
    for name, tensor in weights(trained["patterns"]).items():
        rank = 2 if "q_proj" in name else 6 if name.startswith("1.mlp") else 4
        assert rank == tensor.shape[0 if "lora_A" in name else 1], name
    config = json.loads((trained["patterns"] / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == {"v_proj": 8}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_in_float32_and_is_read_by_peft(name: str, trained: dict[str, Path], base: Path) -> None:
    tensors = weights(trained[name])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.any() for key, tensor in tensors.items() if "lora_B" in key)  # B starts at zero
    model: Any = PeftModel.from_pretrained(qpack.load(base), trained[name])
    config = model.peft_config["default"]
    assert (config.use_rslora, config.use_dora) == (VARIANTS[name].use_rslora, VARIANTS[name].use_dora)
    layers = model.base_model.model.model.layers
    if name == "patterns":
        assert layers[0].self_attn.v_proj.scaling["default"] == 8 / 4
    if name == "rslora":
        assert layers[0].self_attn.v_proj.scaling["default"] == 32 / 2


def test_dora_learns_magnitudes(trained: dict[str, Path], base: Path) -> None:
    magnitudes = {name: tensor for name, tensor in weights(trained["dora"]).items() if "magnitude" in name}
    assert len(magnitudes) == 14
    weight: Any = qpack.load(base, dtype=torch.float32).get_submodule("model.layers.0.self_attn.q_proj")
    norms = weight(torch.eye(weight.in_features)).norm(dim=0)  # a row of the output is a column of the weight
    found = magnitudes["0.self_attn.q_proj.lora_magnitude_vector"]
    assert not torch.equal(found, norms)
    torch.testing.assert_close(found, norms, rtol=0.2, atol=0.05)  # two steps of 1e-2 from where they began


def test_checkpointing_changes_memory_and_nothing_else(trained: dict[str, Path]) -> None:
    plain, again = (load_file(trained[name] / "adapter_model.safetensors") for name in ("plain", "checkpointing"))
    for name, tensor in plain.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert [checkpointing(SETTINGS, device) for device in ("cuda", "cpu")] == [True, False]
    assert checkpointing(VARIANTS["checkpointing"], "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": "q_proj,query"}, r"target_modules: 'query' matches no linear layer; they end in q_proj, "),
        ({"target_modules": r".*\.query"}, r"target_modules: '\.\*\\\.query' matches no linear layer; "),
        ({"rank_pattern": {"query": 2}}, r"rank_pattern: 'query' matches no linear layer; they end in q_proj, "),
        (
            {"target_modules": r".*\.mlp.*"},
            r"target_modules: '\.\*\\\.mlp\.\*' matches 'model\.layers\.0\.mlp' too, which is a LlamaMLP, not a ",
        ),
    ],
)
def test_what_matches_no_linear_layer_is_refused(
    change: dict[str, Any], message: str, base: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=f"^{message}"):
        train(base, data, tmp_path / "adapter", replace(SETTINGS, **change))
    assert list(tmp_path.iterdir()) == []


def test_targets_are_refused_before_weights_are_loaded(base: Path, data: Path, tmp_path: Path) -> None:
    lacking = shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("qpack.json"))
    weights = load_file(lacking / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"^target_modules: 'query' matches no linear layer"):
        train(lacking, data, tmp_path / "adapter", replace(SETTINGS, target_modules="query"))
    with pytest.raises(CheckpointError, match=r"missing keys: model\.norm\.weight"):
        train(lacking, data, tmp_path / "adapter", SETTINGS)


def test_dora_takes_whole_weights() -> None:
    with pytest.raises(DataError, match=r"^use_dora: needs whole weights"):
        replace(SETTINGS, use_dora=True, fsdp=True)
