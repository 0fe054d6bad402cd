"""Sequences that share a row learn what they learn alone, and a model that would mix them is refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconH1Config,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from qpack.data import IGNORED, Example
from qpack.errors import DataError, TrainingError
from qpack.training import TrainSettings, train
from qpack.training.batches import collate, cut
from qpack.training.isolation import require_isolation
from qpack.training.packing import Packs, collate_packs

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.2,
}
PROJECTIONS = r".*\.(q_proj|in_proj|query_key_value)"
WINDOW: dict[str, Any] = {"sliding_window": 5}

ATTENTION = [
    LlamaConfig(**SHAPE),
    Qwen3Config(**SHAPE),
    MistralConfig(**SHAPE, **WINDOW),
    Gemma3TextConfig(**SHAPE, **WINDOW, layer_types=["sliding_attention", "full_attention"]),
]
MIXING = [
    MambaConfig(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.2),
    BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.2),
    FalconH1Config(**SHAPE, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_d_state=4, mamba_n_groups=1),
]


def model_of(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.config.use_cache = False  # as the Trainer sets it
    return model


def examples_of(lengths: Sequence[int]) -> list[Example]:
    """Sequences of random tokens of which the second half is learned."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(97, (length,), generator=generator).tolist() for length in lengths]
    return [
        Example(
            input_ids=row, labels=[IGNORED] * (len(row) // 2 or 1) + row[len(row) // 2 or 1 :], origin=f"rows:{line}"
        )
        for line, row in enumerate(rows, start=1)
    ]


@pytest.mark.parametrize("config", ATTENTION, ids=lambda config: config.model_type)
@torch.no_grad()
def test_packed_logits_are_those_of_each_sequence_alone(config: PreTrainedConfig) -> None:
    model = model_of(config)
    examples = examples_of([9, 1, 14, 3, 12, 7, 2])
    packs = Packs(examples, capacity=16)
    [batch] = cut(collate_packs(packs), rows=len(packs))
    logits = model(**batch).logits
    masked = model(input_ids=batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"])).logits
    mixed = 0.0
    for row, pack in enumerate(packs):
        begin = 0
        for example in pack:
            end = begin + len(example["input_ids"])
            alone = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
            # float32 sums over rows of other lengths: measured up to 4e-6
            torch.testing.assert_close(logits[row, begin:end], alone, rtol=0, atol=2e-5)
            mixed = max(mixed, (masked[row, begin:end] - alone).abs().max().item())
            begin = end
    assert mixed > 0.1  # what an all-ones mask would have done


@pytest.mark.parametrize("config", ATTENTION, ids=lambda config: config.model_type)
@torch.no_grad()
def test_packed_loss_is_that_of_padded_sequences(config: PreTrainedConfig) -> None:
    model = model_of(config)
    examples = examples_of([9, 1, 14, 3, 12, 7, 2])
    packs = Packs(examples, capacity=16)
    packed, padded = collate_packs(packs), collate(examples)
    assert packed["tokens"] == padded["tokens"] == 48
    assert sorted(packed["origins"]) == sorted(padded["origins"])
    for batch in (packed, padded):
        assert (batch["labels"][:, 1:] != IGNORED).sum() == sum(
            label != IGNORED for example in examples for label in example["labels"]
        )
    losses = [model(**cut(batch, 100)[0], num_items_in_batch=10).loss for batch in (packed, padded)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def adapted(config: PreTrainedConfig, dtype: torch.dtype) -> PeftModel:
    return get_peft_model(model_of(config).to(dtype), LoraConfig(target_modules=PROJECTIONS, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", ATTENTION, ids=lambda config: config.model_type)
def test_isolation_is_found_and_nothing_is_changed(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    model = adapted(config, dtype).train()
    state = torch.get_rng_state()
    require_isolation(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cache_would_mix_them() -> None:
    model = adapted(ATTENTION[0], torch.float32)
    model.config.use_cache = True
    with pytest.raises(TrainingError, match="LlamaForCausalLM lets"):
        require_isolation(model)


@pytest.mark.parametrize("config", MIXING, ids=lambda config: config.model_type)
def test_models_that_mix_sequences_are_refused_by_name(config: PreTrainedConfig) -> None:
    model = adapted(config, torch.float32)
    name = type(model.get_base_model()).__name__
    with pytest.raises(TrainingError, match=rf"^packing: {name} lets sequences .* see each other"):
        require_isolation(model)


def test_a_packed_run_takes_the_same_tokens_in_fewer_steps(base: Path, data: Path, tmp_path: Path) -> None:
    settings = TrainSettings(r=2, lora_dropout=0.0, batch_size=2, max_length=128, samples=0)
    padded = train(base, data, tmp_path / "padded", settings)
    packed = train(base, data, tmp_path / "packed", replace(settings, packing=True))
    assert packed.tokens == padded.tokens == 16 * 33 + 6
    # Three sequences of 33 or 34 tokens in 128, so six packs.
    assert (padded.steps, packed.steps) == (8, 3)


def test_packing_is_not_for_pairs() -> None:
    with pytest.raises(DataError, match="packing: not for method 'dpo'"):
        TrainSettings(packing=True, method="dpo")
