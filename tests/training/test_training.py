"""Whole runs on the tiny base: what is learned, what is written, what stops, and that every option does its work."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from runs import contents
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from qpack.errors import CheckpointError, DataError, OutputExistsError, TrainingError
from qpack.training import EvalLog, StepLog, TrainReport, TrainSettings, train
from qpack.training.compute import Compute, choose_compute
from qpack.training.report import Listener

ONE_STEP = TrainSettings(r=2, max_steps=1, warmup_steps=0, optim="adamw_torch", samples=0)


@pytest.fixture(scope="module")
def learned(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainReport:
    """A run long enough to know the sixteen answers by heart."""
    settings = TrainSettings(r=8, lora_dropout=0.0, lr=3e-3, warmup_steps=2, max_steps=60, batch_size=16)
    return train(base, data, tmp_path_factory.mktemp("learned") / "adapter", settings)


def steps_into(logs: list[StepLog]) -> Listener:
    """A listener that keeps the steps."""
    return lambda event: logs.append(event) if isinstance(event, StepLog) else None


def test_loss_falls(learned: TrainReport) -> None:
    assert learned.first_loss > 4
    assert learned.final_loss < 0.1


def test_report_counts(learned: TrainReport) -> None:
    compute = choose_compute()
    shapes = [tensor.shape for tensor in load_file(learned.output / "adapter_model.safetensors").values()]
    assert (learned.steps, learned.examples, learned.truncated) == (60, 16, 0)
    # 16 orders: "<s>user\norder a</s>\n<s>assistant\nitem 0</s>" is 33 tokens, and one more from item 10 on
    assert learned.tokens == 60 * (16 * 33 + 6)
    assert learned.trainable_parameters == sum(shape.numel() for shape in shapes)
    assert learned.compute_dtype == compute.dtype_name
    assert learned.optimizer == ("paged_adamw_8bit" if compute.device == "cuda" else "adamw_8bit")
    assert learned.tokens_per_second == pytest.approx(learned.tokens / learned.seconds)


def test_stock_peft_gives_the_trained_answers(learned: TrainReport, base: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(learned.output)
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), learned.output).eval()
    for index in (0, 7, 15):
        messages = [{"role": "user", "content": f"order {chr(97 + index)}"}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
        answer = output[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(answer) == f"item {index}<|im_end|>"


def test_adapter_directory_is_what_peft_and_vllm_read(learned: TrainReport, base: Path) -> None:
    assert sorted(path.name for path in learned.output.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "metrics.jsonl",
        "qpack_adapter.json",
        "report.html",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((learned.output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 32, 0.0)
    tensors = load_file(learned.output / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tensors) == 2 * 2 * 7  # A and B of seven linear layers in two blocks; none in the head


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA kernels sum in no fixed order")
def test_same_input_gives_the_same_bytes(base: Path, data: Path, tmp_path: Path) -> None:
    settings = TrainSettings(r=4, max_steps=3, warmup_steps=1, batch_size=4)
    first = train(base, data, tmp_path / "first", settings).output
    torch.rand(3)  # the state of the process does not matter
    second = train(base, data, tmp_path / "second", settings).output
    other = train(base, data, tmp_path / "other", replace(settings, seed=1)).output
    assert contents(first) == contents(second)
    weights = "adapter_model.safetensors"
    assert (first / weights).read_bytes() != (other / weights).read_bytes()


@pytest.mark.parametrize(
    ("asked", "on_cpu"),
    [
        ("paged_adamw_8bit", "adamw_8bit"),
        ("paged_adamw_32bit", "adamw_torch"),
        ("adamw_8bit", "adamw_8bit"),
        ("adamw_torch", "adamw_torch"),
    ],
)
def test_every_optimizer_takes_a_step(base: Path, data: Path, tmp_path: Path, asked: str, on_cpu: str) -> None:
    report = train(base, data, tmp_path / "adapter", replace(ONE_STEP, optim=asked))
    assert report.optimizer == (asked if torch.cuda.is_available() else on_cpu)
    trained = load_file(report.output / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in trained.items() if "lora_B" in name)  # LoRA's B starts at zero


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant_with_warmup", [0.0, 0.5, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.5]),
        ("cosine", [0.0, 0.5, 1.0, 0.5]),
    ],
)
def test_every_schedule_honours_the_warm_up(
    base: Path, data: Path, tmp_path: Path, schedule: str, rates: list[float]
) -> None:
    logs: list[StepLog] = []
    settings = replace(ONE_STEP, lr=1e-3, lr_scheduler=schedule, max_steps=4, warmup_steps=2, batch_size=1)
    train(base, data, tmp_path / "adapter", settings, on_event=steps_into(logs))
    assert [log.lr / 1e-3 for log in logs] == pytest.approx(rates)


def forward_of_names(
    self: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    inputs_embeds: Any = None,
    labels: Any = None,
    use_cache: Any = None,
    output_attentions: Any = None,
    output_hidden_states: Any = None,
    return_dict: Any = None,
) -> Any:
    """Llama's own, with the signature of models before transformers passed numbers on to losses: no ``**kwargs``."""
    return _LLAMAS(self, input_ids, attention_mask, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache)


_LLAMAS = LlamaForCausalLM.forward


@pytest.mark.parametrize("forward", [_LLAMAS, forward_of_names], ids=["any names", "no other names"])
def test_accumulation_and_evaluation_weigh_tokens_not_batches(
    forward: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the model's signature says, which is what the Trainer goes by."""
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    monkeypatch.setattr("qpack.training.compute.choose_compute", lambda: Compute("cpu", torch.float32))
    data = tmp_path / "data.jsonl"
    answers = ["a", "b" * 40, "c" * 3, "d" * 20]
    data.write_text("".join(json.dumps({"prompt": "?", "completion": answer}) + "\n" for answer in answers))
    found = []
    for batch_size in (4, 1):
        events: list[Any] = []
        settings = replace(ONE_STEP, lora_dropout=0.0, batch_size=batch_size, grad_accum=4 // batch_size)
        train(base, data, tmp_path / str(batch_size), settings, eval_data=data, on_event=events.append)
        [step] = [event for event in events if isinstance(event, StepLog)]
        [evaluation] = [event for event in events if isinstance(event, EvalLog)]
        found.append((step.tokens, step.loss, step.grad_norm, evaluation.loss))
    assert found[0] == pytest.approx(found[1], rel=1e-4)  # sums in another order


def test_progress_and_epochs(base: Path, data: Path, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    logs: list[StepLog] = []
    settings = replace(ONE_STEP, max_steps=None, epochs=1.5, batch_size=4)
    train(
        base,
        data,
        tmp_path / "adapter",
        settings,
        on_progress=lambda done, total: progress.append((done, total)),
        on_event=steps_into(logs),
    )
    assert progress == [(step, 6) for step in range(7)]
    assert [(log.step, log.total) for log in logs] == [(step, 6) for step in range(1, 7)]
    assert all(log.tokens_per_second > 0 for log in logs)


def test_nothing_is_printed(base: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(base, data, tmp_path / "adapter", ONE_STEP)
    assert capfd.readouterr() == ("", "")


def test_diverging_run_stops_at_its_step(base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "adapter"
    settings = replace(ONE_STEP, max_steps=20, lr=1e30)
    with pytest.raises(
        TrainingError,
        match=r"^(loss|grad_norm) is (nan|inf) at step 2 of 20, learning rate 1e\+30, rows .*orders\.jsonl:\d+, ",
    ):
        train(base, data, output, settings)
    # Nothing is published, and the last checkpoint is there to be looked at.
    [partial] = output.parent.iterdir()
    checkpoints = sorted(partial.glob(".checkpoints/*"))
    assert [path.name for path in checkpoints] == ["checkpoint-1"]
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoints[0] / "adapter_model.safetensors").values())


def test_base_with_broken_weights_stops_at_the_first_step(base: Path, data: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(base, tmp_path / "base")
    path = broken / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"^loss is nan at step 1 of 1, learning rate 0\.0002, rows "):
        train(broken, data, tmp_path / "adapter", ONE_STEP)


def test_warm_up_as_long_as_the_run_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^warmup_steps 3: the run has 3 steps, .* lower warmup_steps$"):
        train(base, data, tmp_path / "adapter", replace(ONE_STEP, max_steps=3, warmup_steps=3))


def test_interrupt_leaves_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    output = tmp_path / "out" / "adapter"
    with pytest.raises(KeyboardInterrupt):
        train(base, data, output, ONE_STEP, on_progress=interrupt)
    assert list(output.parent.iterdir()) == []


def test_existing_adapter_is_replaced_only_on_success(base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    output.mkdir()
    (output / "adapter_config.json").write_text("old")
    with pytest.raises(OutputExistsError, match="adapter"):
        train(base, data, output, ONE_STEP)
    with pytest.raises(TrainingError):
        train(base, data, output, replace(ONE_STEP, max_steps=2, lr=1e30), force=True)
    assert (output / "adapter_config.json").read_text() == "old"
    train(base, data, output, ONE_STEP, force=True)
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 2


def test_base_is_never_replaced(base: Path, data: Path) -> None:
    with pytest.raises(OutputExistsError):
        train(base, data, base, ONE_STEP, force=True)


def edit_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (directory / "config.json").write_text(json.dumps(config))


def drop_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def drop_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()


def drop_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_config, r"config\.json: expected bnb_4bit_quant_type 'nf4' in quantization_config, found 'fp4'"),
        (drop_config, r"config\.json: no such file"),
        (drop_tokenizer, r"no tokenizer that can be loaded"),
        (drop_tensor, r"qpack\.json: records tensor model\.norm\.weight as BF16 \[256\], found none"),
    ],
)
def test_damaged_base_is_refused(
    base: Path, data: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        train(copy, data, tmp_path / "adapter", ONE_STEP)
    assert not (tmp_path / "adapter").exists()


def test_bad_data_is_refused_with_its_line(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": 1, "completion": "b"}\n')
    with pytest.raises(
        DataError, match=r"data\.jsonl:1: prompt: expected a string or a list of messages, found a number"
    ):
        train(base, data, tmp_path / "adapter", ONE_STEP)


def test_import_is_light() -> None:
    program = "import sys, qpack.training\nprint(*sorted({'torch', 'transformers', 'peft', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "\n"


@pytest.mark.gpu
def test_a_gpu_computes_in_16_bits_and_pages_the_optimizer(base: Path, data: Path, tmp_path: Path) -> None:
    report = train(base, data, tmp_path / "adapter", replace(ONE_STEP, optim="paged_adamw_8bit"))
    assert report.optimizer == "paged_adamw_8bit"
    assert report.compute_dtype in ("bfloat16", "float16")
