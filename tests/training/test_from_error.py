"""LoRA that begins from the quantization error: how near it comes to the original, and what refuses to be that."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from moe import write_source
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from runs import contents, finish, kill
from safetensors.torch import load_file, save_file
from tiny import write_llama
from transformers import AutoModelForCausalLM

import qpack
from qpack.errors import AdapterError, CheckpointError, DataError
from qpack.training import TrainSettings, train
from qpack.training.compute import Compute
from qpack.training.from_error import begin_from_error
from qpack.training.low_rank import largest_singular
from qpack.training.model import add_lora, load_base

SETTINGS = TrainSettings(
    r=8, rank_pattern={"q_proj": 3}, alpha_pattern={"up_proj": 5}, use_rslora=True, lr=1e-3, max_steps=4, samples=0
)


@pytest.fixture(scope="module")
def source(base: Path) -> Path:
    """What ``base`` was packed from."""
    return base.parent / "source"


@pytest.fixture(scope="module")
def settings(source: Path) -> TrainSettings:
    return replace(SETTINGS, init_from_error=str(source))


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_every_layer_begins_nearer_to_the_original_and_as_near_as_its_rank_allows(base: Path, source: Path) -> None:
    model = add_lora(load_base(base, Compute("cpu", torch.float32)), SETTINGS)
    drawn = torch.random.get_rng_state()
    assert begin_from_error(model, base, source, "cpu") == 14
    assert torch.equal(torch.random.get_rng_state(), drawn)
    originals = tensors(source)
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        quantized: Any = layer.get_base_layer().weight
        error = originals[f"{name}.weight"].double() - dequantize_4bit(quantized.data, quantized.quant_state).double()
        a, b = (getattr(layer, factor)["default"].weight for factor in ("lora_A", "lora_B"))
        assert a.dtype == b.dtype == torch.float32
        left = (error - layer.scaling["default"] * b.double() @ a.double()).norm()
        best = torch.linalg.svdvals(error)[len(a) :].norm()
        assert best * (1 - 1e-4) <= left <= best * (1 + 1e-3) < error.norm()  # the base rounds what it decodes to bf16


def test_single_experts_begin_so_where_the_source_has_them_in_one_tensor(tmp_path: Path) -> None:
    source = write_source("mixtral", tmp_path / "source", "fused")
    qpack.convert(source, tmp_path / "packed")
    model = add_lora(load_base(tmp_path / "packed", Compute("cpu", torch.float32)), TrainSettings(r=8))
    assert begin_from_error(model, tmp_path / "packed", source, "cpu") == 2 * (4 + 3 * 4)
    experts = load_file(source / "model.safetensors")["model.layers.1.mlp.experts.down_proj"]
    layer: Any = model.get_base_model().get_submodule("model.layers.1.mlp.experts.2.w2")
    quantized = layer.get_base_layer().weight
    error = experts[2].float() - dequantize_4bit(quantized.data, quantized.quant_state).float()
    assert (error - layer.get_delta_weight("default")).norm() < 0.95 * error.norm()


@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (40, 60)])
def test_the_largest_singular_values_are_those_of_a_whole_decomposition(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))  # falls as slowly as an error does
    u, s, vt = largest_singular(matrix, 16)
    values = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(s.double(), values[:16], rtol=2e-3, atol=0)
    assert (matrix - u * s @ vt).norm() <= values[16:].norm() * (1 + 1e-4)


def test_trained_killed_resumed_and_merged_it_is_plain_lora(
    base: Path, data: Path, settings: TrainSettings, source: Path, tmp_path: Path
) -> None:
    settings = replace(settings, lora_dropout=0.1, save_steps=2)
    finish(base, data, tmp_path / "whole", settings)
    kill(base, data, tmp_path / "resumed", settings, 3, delay=0)
    assert finish(base, data, tmp_path / "resumed", settings) == 2
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")

    qpack.merge(base, tmp_path / "whole", tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = PeftModel.from_pretrained(qpack.load(base, dtype=torch.float32), tmp_path / "whole")
    ids = torch.arange(64)[None]
    with torch.no_grad():
        expected = adapted(ids).logits
        assert (merged(ids).logits - expected).abs().max() < 0.02 * expected.std()  # decoded weights in f32, not bf16

    with pytest.raises(AdapterError, match=r"whole: was trained with init_from_error, .* merge it onto that \(--force"):
        qpack.merge(base, tmp_path / "whole", tmp_path / "no", original=source)
    qpack.combine(base, [(tmp_path / "whole", 0.5)], tmp_path / "half")
    with pytest.raises(AdapterError, match=r"half: was trained with init_from_error"):
        qpack.merge(base, tmp_path / "half", tmp_path / "no", original=source)


def test_another_origin_is_refused(base: Path, data: Path, source: Path, tmp_path: Path) -> None:
    def refused(other: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            train(base, data, tmp_path / "adapter", replace(SETTINGS, init_from_error=str(other)))

    touched = shutil.copytree(source, tmp_path / "touched")
    shard = min(touched.glob("*.safetensors"))
    weights = load_file(shard)
    weights[min(weights)][0] += 1
    save_file(weights, shard, metadata={"format": "pt"})
    refused(touched, r"touched: its tensors have digest \w+, expected \w+, from which the base packed was packed$")
    refused(
        write_llama(tmp_path / "wide", intermediate_size=576), r"wide: model.* has shape .*576.*, in the base .*512"
    )
    refused(write_llama(tmp_path / "flat", layers=1), r"flat: has nothing that model\.layers\.1\..* was packed from$")
    refused(base, r"the model is quantized already \(bitsandbytes\)")
    refused(tmp_path / "nowhere", r"nowhere: not a directory$")
    assert not list(tmp_path.glob("*adapter*"))


@pytest.mark.parametrize("other", [{"use_dora": True}, {"method": "dpo"}])
def test_what_it_does_not_go_with(other: dict[str, Any], settings: TrainSettings) -> None:
    with pytest.raises(DataError, match=r"init_from_error"):
        replace(settings, **other)
