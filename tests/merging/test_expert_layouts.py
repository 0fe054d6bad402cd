"""Adapters of experts, trained one by one or all of a layer at once, onto checkpoints that hold them the other way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora import draw_adapter, rounded, tensors
from moe import write_source
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import qpack
from qpack.errors import AdapterError, CheckpointError, SeveralErrors
from serve import ServeConfig

IDS = torch.arange(64)[None] * 5 % 256
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def single(directory: Path, packed: Path, targets: str) -> Path:
    """An adapter as `qpack train` makes it, on packed experts one by one."""
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(qpack.load(packed, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.05
    model.save_pretrained(str(directory))
    return directory


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize(("family", "layout"), [("mixtral", ""), ("mixtral", "fused"), ("qwen3_moe", "")])
def test_single_experts_onto_packed_and_original(family: str, layout: str, tmp_path: Path) -> None:
    source = write_source(family, tmp_path / "source", layout)
    qpack.convert(source, tmp_path / "packed")
    adapter = single(tmp_path / "adapter", tmp_path / "packed", r".*\.experts\.\d+\..*|.*\.q_proj")
    base = qpack.load(tmp_path / "packed", dtype=torch.float32)
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, str(adapter)))
    qpack.merge(tmp_path / "packed", adapter, tmp_path / "merged", dtype="float32")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    # The same weights decoded and added up in f32, by another order of products.
    assert (found - expected).abs().max() < 1e-3 * (expected - plain).abs().max()

    qpack.merge(tmp_path / "packed", adapter, tmp_path / "onto", original=source, dtype="float32")
    merged, original, decoded = tensors(tmp_path / "onto"), tensors(source), tensors(tmp_path / "merged")
    changed = [name for name, weight in merged.items() if not torch.equal(weight, original[name].float())]
    assert sum("experts" in name for name in changed) == sum("experts" in name for name in original)
    if not layout:  # the same names: what is added is the same
        unchanged = tmp_path / "unchanged"
        qpack.merge(tmp_path / "packed", [(adapter, 0.0)], unchanged, dtype="float32")
        for name, weight in tensors(unchanged).items():
            delta = decoded[name] - weight
            assert torch.allclose(merged[name] - original[name].float(), delta, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_all_experts_of_a_layer_onto_single_ones(family: str, tmp_path: Path) -> None:
    source = write_source(family, tmp_path / "source")
    adapter = draw_adapter(tmp_path / "adapter", source, target_modules=["q_proj"], target_parameters=PARAMETERS)
    qpack.merge(source, adapter, tmp_path / "merged")
    stock: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    peft: Any = PeftModel.from_pretrained(stock, str(adapter), autocast_adapter_dtype=False)
    expected = peft.double().merge_and_unload().state_dict()
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {name for name in tensors(tmp_path / "merged")} == set(tensors(source))
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, rounded(expected[name])), name

    qpack.convert(source, tmp_path / "packed")
    report = qpack.merge(tmp_path / "packed", adapter, tmp_path / "onto-packed")
    assert sum("experts" in name for name in report.effects) == sum("experts" in name for name in tensors(source))
    if family == "mixtral":  # vLLM knows Mixtral's modules by the checkpoint's names
        with pytest.raises(SeveralErrors, match="target_parameters"):
            ServeConfig(tmp_path / "packed", {"mine": adapter})


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    """Where gate and up alternate by columns, an adapter of a single expert is refused."""
    source = write_source("gpt_oss", tmp_path / "source")
    qpack.convert(source, tmp_path / "packed")
    adapter = single(tmp_path / "adapter", tmp_path / "packed", r".*\.experts\..*\.gate_proj")
    with pytest.raises(AdapterError, match=r"experts\.0\.gate_proj is of one expert, .* two of each in alternate"):
        qpack.merge(tmp_path / "packed", adapter, tmp_path / "merged", original=source)
    down = single(tmp_path / "down", tmp_path / "packed", r".*\.experts\..*\.down_proj")
    report = qpack.merge(tmp_path / "packed", down, tmp_path / "merged", original=source, dtype="float32")
    assert len(report.effects) == 2
    merged, original = tensors(tmp_path / "merged"), tensors(source)
    factors = tensors(down)
    prefix = "base_model.model.model.layers.1.mlp.experts.2.down_proj"
    product = 1.5 * factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"]  # (out, in)
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.allclose((merged[name] - original[name].float())[2], product.T, atol=1e-6)


def test_mxfp4_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = write_source("gpt_oss", tmp_path / "source", "mxfp4")
    adapter = draw_adapter(tmp_path / "adapter", write_source("gpt_oss", tmp_path / "plain"), target_modules=["q_proj"])
    qpack.convert(source, tmp_path / "packed")
    before = sorted(path.name for path in tmp_path.iterdir())
    for base, original in ((source, None), (tmp_path / "packed", source)):
        with pytest.raises(CheckpointError, match="is MXFP4, which is not merged onto"):
            qpack.merge(base, adapter, tmp_path / "merged", original=original)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
