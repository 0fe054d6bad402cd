"""Training tokens a second and memory against TRL's SFTTrainer, on the same packed base, data and settings.

    python benches/train_vs_trl.py [--base DIR] [--steps 3] [--rounds 3] [--packing] [--checkpointing]

Packs SmolLM2-135M-Instruct, the demo's model, and trains LoRA of rank 16 on all linear layers with each of

- qpack: `qpack.train` as a user calls it, in the dtype that it chooses;
- TRL: SFTTrainer as it comes, which casts LoRA to bfloat16 on a 4-bit base;
- TRL, LoRA f32: with that cast undone. Only here the losses must be qpack's: the exit status is 1 if they are not, to
  1e-3 of them, or if qpack is not 1.5 times as fast as both; on a GPU, if it is slower than one of them or takes more
  memory. In bfloat16 they are not the same to the last digit: Adam's first steps are as long as the rate is, also where
  a gradient is little more than rounding.

Tokens, labels (those of the assistant alone), first adapter, rate, batch and accumulation are the same for all; dropout
is 0 and checkpointing off, or on, for all. Each row is in one step, whatever the packer and the sampler make of their
order, so the losses of a step are comparable. Every measurement is a process of its own, all sides in turn; the medians
of all steps but the first are shown, by the clock and by the processor's time, which other processes disturb less, and
the largest peak: on a GPU what torch had reserved, with an allowance for what is not torch's, on a CPU the process'.
"""

import argparse
import json
import math
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import qpack
from qpack.data import DataOptions, Example, encode, pack, read
from qpack.demo.model import write_model
from qpack.sizes import format_size
from qpack.training import Event, RunBegin, StepLog, TrainSettings
from qpack.training.memory import peak_memory

BATCH, LENGTH, ROWS = 4, 512, 16
SIDES = ("qpack", "TRL", "TRL, LoRA f32")
GOAL = {"cpu": 1.5, "cuda": 1.0}
TOLERANCE = 1e-3

Step = tuple[float, float, float]
"""Its loss, seconds and seconds of the processor."""


def write_data(path: Path) -> None:
    """Conversations of random words: 60 to 400 tokens, of which a little more than half are learned."""
    draw = random.Random(0)
    words = "the quick brown fox jumps over a lazy dog while seven wizards make toxic brew under the moon".split()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(ROWS):
            user, assistant = (" ".join(draw.choices(words, k=draw.randint(*most))) for most in ((20, 120), (20, 200)))
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
            file.write(json.dumps({"messages": messages}) + "\n")


def encoded(base: Path, data: Path) -> list[Example]:
    """The rows as qpack tokenizes them."""
    from qpack.loading.tokenizer import load_tokenizer

    return list(encode(read(data, DataOptions()), load_tokenizer(base), base, DataOptions(), LENGTH).examples)


def settings_for(rows: int, steps: int, packing: bool, checkpointing: bool) -> TrainSettings:
    """One step is all ``rows`` of the batches."""
    return TrainSettings(
        r=16,
        lora_dropout=0.0,
        batch_size=BATCH,
        grad_accum=math.ceil(rows / BATCH),
        max_length=LENGTH,
        max_steps=steps,
        save_steps=steps,
        samples=0,
        warmup_steps=0,
        packing=packing,
        gradient_checkpointing=checkpointing,
        optim="adamw_torch",
    )


def stopwatch() -> Callable[[], tuple[float, float]]:
    """A function that returns what has passed since it was called last."""
    last = [time.perf_counter(), time.process_time()]

    def lap() -> tuple[float, float]:
        now = [time.perf_counter(), time.process_time()]
        passed = now[0] - last[0], now[1] - last[1]
        last[:] = now
        return passed

    return lap


def device() -> str:
    """Where both train."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def with_qpack(base: Path, data: Path, settings: TrainSettings, work: Path) -> Iterator[Step]:
    """Train as a user does."""
    lap = stopwatch()
    steps: list[Step] = []

    def listen(event: Event) -> None:
        if isinstance(event, RunBegin):
            lap()
        elif isinstance(event, StepLog):
            steps.append((event.loss, *lap()))

    qpack.train(base, data, work / "adapter", settings, on_event=listen)
    yield from steps


def with_trl(base: Path, data: Path, settings: TrainSettings, work: Path, lora_f32: bool) -> Iterator[Step]:
    """Train as SFTTrainer does, from the adapter that qpack begins with."""
    import torch
    from datasets import Dataset  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    from qpack.training.model import add_lora

    examples = [{name: example[name] for name in ("input_ids", "labels")} for example in encoded(base, data)]
    set_seed(settings.seed)
    model = add_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), settings)
    first = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    lap = stopwatch()
    steps: list[Step] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            lap()

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs: dict[str, float] = kwargs["logs"]
            if "loss" in logs:
                steps.append((logs["loss"], *lap()))

    arguments = SFTConfig(
        output_dir=str(work / "trl"),
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optim,
        seed=settings.seed,
        max_length=settings.max_length,
        packing=settings.packing,
        train_sampling_strategy="random" if settings.packing else "group_by_length",
        gradient_checkpointing=bool(settings.gradient_checkpointing),
        use_cpu=device() == "cpu",
        dataloader_pin_memory=device() == "cuda",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(examples),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[Watch()],
    )
    if lora_f32:
        for name, weight in model.named_parameters():
            if name in first:
                weight.data = first[name]
    trainer.train()
    yield from steps


def measure(arguments: argparse.Namespace, packing: bool, side: str) -> dict[str, Any]:
    """Train on one side in a new process."""
    command = [sys.executable, __file__, "--base", str(arguments.base), "--steps", str(arguments.steps)]
    command += ["--side", side, *["--packing"] * packing, *["--checkpointing"] * arguments.checkpointing]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_side(arguments: argparse.Namespace, work: Path) -> None:
    """Train on one side and print its steps as JSON."""
    data = work / "data.jsonl"
    write_data(data)
    lengths = [len(example["input_ids"]) for example in encoded(arguments.base, data)]
    rows = len(pack(lengths, LENGTH)) if arguments.packing else len(lengths)
    settings = settings_for(rows, arguments.steps + 1, arguments.packing, arguments.checkpointing)
    if arguments.side == "qpack":
        steps = [*with_qpack(arguments.base, data, settings, work)]
    else:
        steps = [*with_trl(arguments.base, data, settings, work, lora_f32=arguments.side != "TRL")]
    print(json.dumps({"tokens": sum(lengths), "steps": steps, "peak": peak_memory(device())}))


def compare(arguments: argparse.Namespace, packing: bool) -> bool:
    """Print a table of all sides; return whether the goals are met."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side in SIDES:
            found[side].append(measure(arguments, packing, side))
    tokens = found["qpack"][0]["tokens"]
    print(f"\n{'packed' if packing else 'not packed'}: {ROWS} rows, {tokens} tokens a step")
    speeds: dict[str, tuple[float, float]] = {}
    peaks = {side: max(run["peak"] for run in found[side]) for side in SIDES}
    for side in SIDES:
        later = [step for run in found[side] for step in run["steps"][1:]]
        clock, processor = (tokens / median(step[part] for step in later) for part in (1, 2))
        speeds[side] = clock, processor
        losses = " ".join(f"{loss:.4f}" for loss, *_ in found[side][0]["steps"])
        ratios = " / ".join(f"{mine / own:.2f}" for mine, own in zip(speeds["qpack"], speeds[side], strict=True))
        rates = f"{clock:6.0f} tokens/s  {processor:6.0f} tokens/cpu-s  qpack {ratios} x"
        print(f"  {side:14} {rates}  peak {format_size(peaks[side])}  losses {losses}")
    pairs = zip(found["qpack"][0]["steps"], found[SIDES[2]][0]["steps"], strict=True)
    apart = max(abs(mine[0] - other[0]) / other[0] for mine, other in pairs)
    print(f"  losses of qpack and {SIDES[2]}: at most {apart:.1e} of them apart")
    fast = all(speeds["qpack"][0] >= GOAL[device()] * speeds[side][0] for side in SIDES[1:])
    small = device() == "cpu" or all(peaks["qpack"] <= peaks[side] for side in SIDES[1:])
    return apart <= TOLERANCE and fast and small


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a packed checkpoint; default: SmolLM2-135M-Instruct, packed anew")
    parser.add_argument("--steps", type=int, default=3, help="measured in each process, after one to warm up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again, on all sides")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--packing", action="store_true", help="packed rows only, not both")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if arguments.side:
            run_side(arguments, Path(work))
            return
        if arguments.base is None:
            write_model(Path(work, "source"), None)
            arguments.base = Path(work, "packed")
            qpack.convert(Path(work, "source"), arguments.base)
        print(f"{platform.processor() or platform.machine()}, {arguments.steps} steps x {arguments.rounds} rounds")
        met = [compare(arguments, packing) for packing in ((True,) if arguments.packing else (False, True))]
    sys.exit(0 if all(met) else 1)


if __name__ == "__main__":
    main()
