"""The training loop: transformers' Trainer on sequences that are already tokenized, labelled and checked.

Why not TRL's SFTTrainer, which extends it: what it adds is tokenizing, masking and LoRA set-up, all done here before,
and on a 4-bit base it casts LoRA to bfloat16. What the Trainer gives is used: schedules, accumulation that weighs
tokens (not batches) equally, mixed precision, checkpointing, batches of like length, seeding.

Two things are ours. A loss or gradient norm that is not finite ends the run, naming the step; the Trainer by itself
replaces it in its log and goes on. And nothing is printed: progress goes to the caller's functions.

One process trains on one device. On a CPU the same input, settings and number of threads give the same bytes; CUDA
kernels sum in no fixed order.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from qpack.data import IGNORED, Example
from qpack.errors import TrainingError
from qpack.training.compute import Compute
from qpack.training.model import require_float32_adapter
from qpack.training.report import StepLog
from qpack.training.settings import TrainSettings

UNPAGED = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "adamw_torch"}
"""What stands for a paged optimizer on a CPU, which has no second memory to page to: the same update, unpaged."""


@dataclass(slots=True)
class Steps:
    """What the steps of one run came to."""

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


def optimizer_for(settings: TrainSettings, compute: Compute) -> str:
    """Return the optimizer that the device can run for the one asked for."""
    return settings.optim if compute.device == "cuda" else UNPAGED.get(settings.optim, settings.optim)


def fit(
    model: PeftModel,
    examples: Sequence[Example],
    settings: TrainSettings,
    compute: Compute,
    *,
    scratch: Path,
    on_progress: Callable[[int, int], None] | None = None,
    on_log: Callable[[StepLog], None] | None = None,
) -> Steps:
    """Train the adapter in place. ``scratch`` is a directory that the Trainer may use; it leaves nothing there.

    Raises:
        TrainingError: the loss or a gradient is no longer finite, the warm-up is longer than the run, or LoRA is not
            in float32.
    """
    steps = Steps()
    watch = _Watch(steps, settings, compute, on_progress, on_log)
    trainer = Trainer(
        model=model,
        args=_arguments(settings, compute, scratch),
        train_dataset=examples,
        data_collator=collate,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)  # without a progress bar the Trainer prints its log
    require_float32_adapter(model)
    trainer.train()
    return steps


def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest sequence.

    Padding is told by the mask and the labels alone, never by its id: any id does, and an EOS in the text stays one.
    """
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])  # (batch, longest)

    return {
        "input_ids": padded([example["input_ids"] for example in examples], 0),
        "attention_mask": padded([[1] * len(example["input_ids"]) for example in examples], 0),
        "labels": padded([example["labels"] for example in examples], IGNORED),
    }


def _arguments(settings: TrainSettings, compute: Compute, scratch: Path) -> TrainingArguments:
    on_gpu = compute.device == "cuda"
    arguments = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        optim=optimizer_for(settings, compute),
        seed=settings.seed,
        train_sampling_strategy="group_by_length",
        use_cpu=not on_gpu,
        bf16=compute.dtype == torch.bfloat16,
        fp16=compute.dtype == torch.float16,
        gradient_checkpointing=on_gpu,  # on a CPU memory is rarely what runs out, and recomputing costs a third
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_pin_memory=on_gpu,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    arguments._n_gpu = 1  # the model is on one device; the Trainer would multiply the batch by those beside it
    return arguments


class _Watch(TrainerCallback):
    """Follows every step: stops at the first that is not finite, and passes the others on."""

    def __init__(
        self,
        steps: Steps,
        settings: TrainSettings,
        compute: Compute,
        on_progress: Callable[[int, int], None] | None,
        on_log: Callable[[StepLog], None] | None,
    ) -> None:
        self.steps = steps
        self.settings = settings
        # With float16 an infinite gradient is how the gradient scaler finds its scale: it skips the step by itself.
        self.checked = ("loss",) if compute.dtype == torch.float16 else ("loss", "grad_norm")
        self.on_progress = on_progress or (lambda step, total: None)
        self.on_log_step = on_log or (lambda log: None)
        self.clock = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a warm-up that never ends, and start the clock."""
        if self.settings.warmup_steps >= state.max_steps:
            raise TrainingError(
                f"warmup_steps {self.settings.warmup_steps}: the run has {state.max_steps} steps, so the learning rate "
                f"would never reach {self.settings.lr}; lower warmup_steps"
            )
        self.on_progress(0, state.max_steps)
        self.clock = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check and record one step."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:  # the Trainer's summary after the last step
            return
        for name in self.checked:
            if not math.isfinite(logs[name]):
                raise TrainingError(
                    f"{name} is {logs[name]} at step {state.global_step} of {state.max_steps}, learning rate "
                    f"{logs['learning_rate']:g}; lower the learning rate or look for broken weights in the base"
                )
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        tokens = state.num_input_tokens_seen - self.steps.tokens
        self.steps.losses.append(logs["loss"])
        self.steps.tokens = state.num_input_tokens_seen
        self.steps.seconds += seconds
        self.on_progress(state.global_step, state.max_steps)
        self.on_log_step(
            StepLog(state.global_step, state.max_steps, logs["loss"], logs["learning_rate"], tokens / seconds)
        )
