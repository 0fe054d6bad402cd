"""Two processes do what one does with a batch twice as large, each with all of the base or with half of it."""

import json
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moe import SIZES
from processes import run_together
from safetensors.torch import load_file
from tiny import write_tokenizer
from transformers import AutoModelForCausalLM, OlmoeConfig

import qpack
from qpack.errors import TrainingError
from qpack.training import Event, StepLog, TrainReport, TrainSettings, train
from qpack.training.compute import Compute
from qpack.training.distributed import Processes

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="compared with a run of one process, on a CPU")

WEIGHTS = "adapter_model.safetensors"
SETTINGS = TrainSettings(r=4, lora_dropout=0.0, lr=1e-3, max_steps=4, batch_size=2, grad_accum=2, save_steps=2)


def run(
    base: Path, data: Path, output: Path, settings: TrainSettings, stop: int | None = None
) -> tuple[TrainReport, list[float]]:
    """Train as one of several processes; the first is killed after step ``stop``."""
    losses: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepLog):
            losses.append(event.loss)
            if event.step == stop:
                os._exit(9)

    return train(base, data, output, settings, on_event=listen), losses


@pytest.fixture(scope="module")
def settings(base: Path) -> TrainSettings:
    """With factors that the first process works out, and the others must be sent."""
    return replace(SETTINGS, init_from_error=str(base.parent / "source"), loraplus_lr_ratio=2.0)


@pytest.fixture(scope="module")
def together(
    base: Path, data: Path, settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainReport, list[float]]:
    """A run of two processes that hold all of the base."""
    output = tmp_path_factory.mktemp("ddp") / "adapter"
    first, second = run_together(run, base, data, output, settings)
    assert second[1] == []  # only the first reports
    own = {name: getattr(second[0], name) for name in ("seconds", "tokens_per_second", "peak_memory")}
    assert second[0] == replace(first[0], **own)
    return first[0], first[1]


def run_in_float32(*arguments: Any) -> tuple[TrainReport, list[float]]:
    """`run` as on a processor that has no bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qpack.training.compute.choose_compute", lambda: Compute("cpu", torch.float32))
        return run(*arguments)


@on_cpu
def test_losses_and_adapter_are_those_of_one_process(base: Path, data: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, modules_to_save="norm")
    (report, losses), _ = run_together(run_in_float32, base, data, tmp_path / "together", settings)
    alone, expected = run_in_float32(base, data, tmp_path / "alone", replace(settings, batch_size=4))
    assert report.tokens == alone.tokens
    # Sums over a batch are in another order. Seen: 1e-7 of a loss, and 1e-6 of a weight after four steps of 1e-3, 0.1 %
    # of them; in bfloat16 they part as steps go on, since Adam takes a step of lr where the gradient is but rounding.
    assert losses == pytest.approx(expected, rel=2e-6)
    mine, theirs = load_file(alone.output / WEIGHTS), load_file(report.output / WEIGHTS)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert ((tensor - theirs[name]).abs() > 1e-5).float().mean() < 1e-3, name


@on_cpu
def test_half_of_the_base_in_each_gives_the_same_adapter(
    together: tuple[TrainReport, list[float]], base: Path, data: Path, settings: TrainSettings, tmp_path: Path
) -> None:
    config = tmp_path / "settings.yaml"
    values = {name: getattr(settings, name) for name in TrainSettings.__dataclass_fields__}
    config.write_text(json.dumps(values))  # YAML too
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "qpack", "train", str(base), str(data), "-o", str(tmp_path / "adapter"), "--config", str(config)]
    done = subprocess.run([*launcher, *command, "--fsdp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    says = "2 processes (gloo, cpu): FSDP2, each holds 1/2 of the base; 2 x 2 x 2 = 8 sequences a step\n"
    assert done.stderr.count(says) == 1
    assert done.stdout.count(f"{tmp_path / 'adapter'}: loss ") == 1
    report, _ = together
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == (report.output / WEIGHTS).read_bytes()


@on_cpu
def test_killed_and_resumed_it_is_the_same_adapter(
    together: tuple[TrainReport, list[float]], base: Path, data: Path, settings: TrainSettings, tmp_path: Path
) -> None:
    with pytest.raises(BrokenProcessPool):
        run_together(run, base, data, tmp_path / "adapter", settings, 3)
    assert not (tmp_path / "adapter").exists()
    # A checkpoint does not tell whether the base was whole: the run may go on with a half in each.
    first, _ = run_together(run, base, data, tmp_path / "adapter", replace(settings, fsdp=True))
    assert first[0].resumed_step == 2
    report, losses = together
    assert first[1] == losses[2:]
    assert (first[0].output / WEIGHTS).read_bytes() == (report.output / WEIGHTS).read_bytes()


def test_experts_without_a_token(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    many = OlmoeConfig(**SIZES, intermediate_size=64, num_experts=64)  # more than the 2 x 33 places of a batch can fill
    AutoModelForCausalLM.from_config(many).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    qpack.convert(tmp_path / "source", tmp_path / "packed")
    settings = replace(SETTINGS, batch_size=1, grad_accum=1, max_steps=2)
    first, second = run_together(run, tmp_path / "packed", data, tmp_path / "adapter", settings)
    assert first[0].steps == second[0].steps == 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus_do_what_one_does(base: Path, data: Path, tmp_path: Path) -> None:
    _, expected = run(base, data, tmp_path / "alone", replace(SETTINGS, batch_size=4))
    for fsdp in (False, True):
        settings = replace(SETTINGS, fsdp=fsdp)
        (_, losses), _ = run_together(run, base, data, tmp_path / f"{fsdp}", settings, on_gpus=True)
        assert losses == pytest.approx(expected, rel=1e-2)  # bfloat16 keeps 8 bits


def left_running() -> set[str]:
    """The threads of this process when it has talked to others, and a cycle has held what they talked by."""
    with Processes.launched().joined():
        cycle: list[Any] = [torch.distributed.group.WORLD]
        cycle.append(cycle)
        del cycle
        Processes.launched().gathered(None)
    return {name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")}


@on_cpu
def test_no_thread_of_gloo_outlives_a_run() -> None:
    for threads in run_together(left_running):
        assert not {name for name in threads if "gloo" in name}


def refused(base: Path, data: Path, output: Path) -> str:
    try:
        train(base, data, output, SETTINGS)
    except qpack.QpackError as error:
        return str(error)
    return "not refused"


def test_input_is_refused_once(base: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}\n")
    first, second = run_together(refused, base, tmp_path / "data.jsonl", tmp_path / "adapter")
    assert "data.jsonl:1: " in first
    assert second == "rank 1: stopped because rank 0 did, which says why"


def test_sharding_takes_several_processes(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^fsdp: there is one process; start several with torchrun "):
        train(base, data, tmp_path / "adapter", replace(SETTINGS, fsdp=True))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, r"^WORLD_SIZE is 2 but RANK is not set; start with torchrun$"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"^accelerate_use_fsdp is set by accelerate's config: .* qpack's own fsdp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"DeepSpeed cannot shard packed weights"),
    ],
)
def test_what_would_not_be_done_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Processes.launched(environment)


def test_what_launchers_say() -> None:
    assert Processes.launched({}) == Processes.launched({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"})
    assert Processes.launched({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}) == Processes(3, 4, 1)
