"""DPO's loss is TRL's, its margin rises, and a run of it is interrupted, spread and stopped like any other."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from families import FAMILIES, Largest, of_family
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from processes import run_together
from runs import finish, kill
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qpack.data import IGNORED, Example, Preference
from qpack.errors import DataError, TrainingError
from qpack.loading.tokenizer import load_tokenizer
from qpack.training import Event, StepLog, TrainSettings, log_probs, train
from qpack.training.compute import Compute
from qpack.training.dpo import collate_pairs, preference_losses, rewards
from qpack.training.log_probs import give_log_probs, whole_log_probs
from qpack.training.model import add_lora, load_base

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA kernels sum in no fixed order")

WEIGHTS = "adapter_model.safetensors"
SETTINGS = TrainSettings(method="dpo", r=4, lr=3e-3, max_steps=6, batch_size=4, save_steps=2, optim="adamw_torch")


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen orders, each with the right answer and another one."""
    path = tmp_path_factory.mktemp("preferences") / "orders.jsonl"
    rows = [
        {"prompt": f"order {chr(97 + index)}", "chosen": f"item {index}", "rejected": f"item {(index + 5) % 16}"}
        for index in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(base: Path, data: Path, output: Path, settings: TrainSettings) -> list[StepLog]:
    logs: list[StepLog] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepLog):
            logs.append(event)

    train(base, data, output, settings, on_event=listen)
    return logs


def test_loss_and_gradients_are_trls(base: Path, tmp_path: Path) -> None:
    from datasets import Dataset  # type: ignore[import-untyped]
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    compute = Compute("cpu", torch.float32)
    model = add_lora(load_base(base, compute), replace(SETTINGS, lora_dropout=0.0))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)  # zeros would make the loss log 2 whatever the rest
    give_log_probs(cast(PreTrainedModel, model.get_base_model()))
    batch = collate_pairs([pair([1, 2, 3], [4, 5, 6, 7], [9, 8]), pair([11, 12], [40, 50], [9, 8, 7, 6, 5, 4])])
    ours = preference_losses(rewards(model, model, batch, 0.1)).mean()
    ours.backward()

    config: Any = model.peft_config["default"]
    trainer: Any = DPOTrainer(
        model=load_base(base, compute),
        args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", beta=0.1),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=load_tokenizer(base),
        peft_config=LoraConfig(
            r=config.r, lora_alpha=config.lora_alpha, target_modules=config.target_modules, task_type="CAUSAL_LM"
        ),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # TRL has cast it to bfloat16
    set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(model))
    sides = {name: torch.cat(batch[name].unbind(1)) for name in ("input_ids", "attention_mask", "labels")}
    completion = (sides.pop("labels") != IGNORED).long()
    theirs = trainer.compute_loss(trainer.model, {**sides, "completion_mask": completion})
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> Preference:
    def side(answer: list[int]) -> Example:
        labels = [IGNORED] * len(prompt) + answer
        return Example(input_ids=prompt + answer, labels=labels, origin="data.jsonl:1")

    return Preference(chosen=side(chosen), rejected=side(rejected))


@pytest.mark.parametrize(("family", "special"), FAMILIES)
def test_log_probs_in_pieces_are_those_of_whole_logits(
    family: str, special: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = of_family(family, special)
    ids = torch.randint(1, 4096, (3, 64))
    labels = ids.where(torch.arange(64) > torch.tensor([[3], [9], [14]]), IGNORED)
    expected = whole_log_probs(model(input_ids=ids).logits, labels)
    weight = model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(expected.sum(), weight)

    monkeypatch.setattr(log_probs, "LOGITS_AT_A_TIME", 4 * 4096)
    give_log_probs(model)
    largest = Largest()  # type: ignore[no-untyped-call]
    with caplog.at_level(logging.WARNING), largest:
        found = model(input_ids=ids, labels=labels)["log_probs"]
        (found_gradient,) = torch.autograd.grad(found.sum(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-3, atol=1e-4)
    assert not [record for record in caplog.records if record.name.startswith("qpack")]
    assert largest.elements == weight.numel()  # 64 rows of logits; there are 192 positions


def test_a_head_of_no_known_kind_gets_its_logits_whole(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    stock = model.forward

    def squared(*args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        output.logits = output.logits**2
        return output

    model.forward = squared
    ids = torch.randint(1, 64, (2, 8))
    expected = whole_log_probs(model(input_ids=ids).logits, ids)
    give_log_probs(model)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(model(input_ids=ids, labels=ids)["log_probs"], expected)
        torch.testing.assert_close(model(input_ids=ids, labels=ids)["log_probs"], expected)
    assert [record.getMessage() for record in caplog.records] == [
        "LlamaForCausalLM: its logits are computed whole, its head being of no known kind"
    ]


def test_the_margin_rises(base: Path, preferences: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_steps=20, batch_size=8, lora_dropout=0.0)
    logs = run(base, preferences, tmp_path / "adapter", settings)
    first, last = logs[0].rewards, logs[-1].rewards
    assert first and last
    assert logs[0].loss == pytest.approx(0.6931, abs=1e-3)  # log 2: the adapter begins as nothing
    assert (first.chosen, first.margin) == pytest.approx((0, 0), abs=1e-3)
    assert last.accuracy == 1.0
    assert last.margin == pytest.approx(last.chosen - last.rejected)
    assert last.margin > 0.5
    assert logs[-1].loss < 0.5


@on_cpu
def test_a_step_is_a_mean_over_pairs_however_it_is_cut(base: Path, preferences: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_steps=2, lora_dropout=0.0)
    whole = run(base, preferences, tmp_path / "whole", settings)
    parts = run(base, preferences, tmp_path / "parts", replace(settings, batch_size=2, grad_accum=2))
    assert [log.loss for log in parts] == pytest.approx([log.loss for log in whole], abs=2e-3)
    assert parts[1].rewards and whole[1].rewards
    assert parts[1].rewards.margin == pytest.approx(whole[1].rewards.margin, abs=2e-2)
    halves = replace(settings, batch_size=2, fsdp=True)
    (together, _) = run_together(run, base, preferences, tmp_path / "together", halves)
    assert [log.loss for log in together] == pytest.approx([log.loss for log in whole], abs=2e-3)
    assert together[1].rewards.margin == pytest.approx(whole[1].rewards.margin, abs=2e-2)


@on_cpu
def test_killed_and_resumed_it_is_the_same_adapter(base: Path, preferences: Path, tmp_path: Path) -> None:
    kill(base, preferences, tmp_path / "killed", SETTINGS, step=3, delay=0)
    assert finish(base, preferences, tmp_path / "killed", SETTINGS) == 2
    assert finish(base, preferences, tmp_path / "whole", SETTINGS) == 0
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_loss_that_is_not_finite_stops_it(base: Path, preferences: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"^loss is nan at step 1 of 6, .*orders\.jsonl:\d+, "):
        train(broken, preferences, tmp_path / "adapter", SETTINGS)


def test_conversations_are_no_preferences(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"orders\.jsonl:1: "):
        train(base, data, tmp_path / "adapter", SETTINGS)
