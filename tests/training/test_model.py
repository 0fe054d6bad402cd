"""The model under training: dtypes, what is trainable, and the guard against repacking on a CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from transformers import set_seed

from qpack.errors import TrainingError
from qpack.loading.in_place import keep_weights_in_place
from qpack.training import TrainSettings
from qpack.training.compute import Compute, choose_compute
from qpack.training.model import add_lora, load_base, require_float32_adapter

SETTINGS = TrainSettings(r=4, lora_dropout=0.0)
FLOAT32 = Compute("cpu", torch.float32)
BFLOAT16 = Compute("cpu", torch.bfloat16)


def adapted(base: Path, compute: Compute) -> PeftModel:
    set_seed(0)
    return add_lora(load_base(base, compute), SETTINGS)


@pytest.mark.parametrize("compute", [FLOAT32, BFLOAT16], ids=lambda compute: compute.dtype_name)
def test_compute_dtype_is_ours_and_lora_is_float32(base: Path, compute: Compute) -> None:
    model = adapted(base, compute)
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    assert len(layers) == 2 * 7
    assert {layer.compute_dtype for layer in layers} == {compute.dtype}
    assert model.get_input_embeddings().weight.dtype == compute.dtype
    trainable = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(layers)
    assert set(trainable.values()) == {torch.float32}
    require_float32_adapter(model)


def test_cast_adapter_is_refused(base: Path) -> None:
    model = adapted(base, BFLOAT16).to(torch.bfloat16)
    with pytest.raises(TrainingError, match=r"lora_A.* expected a float32 weight, found torch\.bfloat16"):
        require_float32_adapter(model)


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    tokens = torch.arange(64).reshape(2, 32)
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.skipif(
    not has_avx512bf16(),
    reason="bitsandbytes repacks only on processors with AVX512-BF16",
)
@pytest.mark.parametrize("compute", [FLOAT32, BFLOAT16], ids=lambda compute: compute.dtype_name)
def test_evaluation_does_not_change_training(base: Path, compute: Compute) -> None:
    expected = gradients(adapted(base, compute))
    model = adapted(base, compute).eval()
    with torch.no_grad():
        model(input_ids=torch.arange(32).reshape(1, 32))
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_bitsandbytes_without_the_switch_is_refused() -> None:
    layer = Linear4bit(64, 64)
    del layer.support_avx512bf16_for_cpu
    with pytest.raises(TrainingError, match=r"^0: bitsandbytes [\d.]+ has no support_avx512bf16_for_cpu to turn off"):
        keep_weights_in_place(torch.nn.Sequential(layer))


@pytest.mark.parametrize(
    ("capabilities", "dispatched", "dtype"),
    [
        ({"avx512_bf16": True}, "AVX512", torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, "AVX512", torch.bfloat16),
        ({"avx512_bf16": True}, "AVX2", torch.float32),  # held down by ATEN_CPU_CAPABILITY
        ({"avx2": True}, "AVX2", torch.float32),
        ({}, "DEFAULT", torch.float32),
    ],
)
def test_dtype_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], dispatched: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: dispatched)
    assert choose_compute() == Compute("cpu", dtype)


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_dtype_on_a_gpu(monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype) -> None:
    supported: Callable[..., bool] = lambda *, including_emulation: native or including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert choose_compute() == Compute("cuda", dtype)
