"""The training loop: transformers' Trainer on sequences that are already tokenized, labelled and checked.

Why not TRL's SFTTrainer, which extends it: what it adds is tokenizing, masking and LoRA set-up, all done here before,
and on a 4-bit base it casts LoRA to bfloat16. What the Trainer gives is used: schedules, accumulation that weighs
tokens (not batches) equally, mixed precision, the content of a checkpoint, trackers, seeding.

Ours are the order of the batches (`qpack.training.batches`), packing (`qpack.training.packing`), checkpoints that are
whole or not there (`qpack.training.checkpoints`), and three things that the Trainer by itself does otherwise:

- A loss or gradient norm that is not finite ends the run, naming the step, the rate and the rows of the data. The
  Trainer replaces it in its log and goes on.
- A batch for which memory does not suffice is cut in two, and the step begun again. The sum over a step stays what it
  was, and so do schedule and data. The Trainer's ``auto_find_batch_size`` begins the whole run again.
- The loss of an evaluation is the mean over tokens. The Trainer takes the mean over batches of their means.

Nothing is printed: what happens goes to the caller's listeners.

One process trains on one device. On a CPU the same input, settings and number of threads give the same bytes, resumed
or not; CUDA kernels sum in no fixed order.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size  # type: ignore[import-untyped]
from peft import PeftModel
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from qpack.data import IGNORED
from qpack.errors import TrainingError
from qpack.loading.adapters import save_adapter
from qpack.training.averaging import average_gradients
from qpack.training.batches import Batch, Order, collate, cut
from qpack.training.checkpoints import Checkpoints
from qpack.training.compute import Compute
from qpack.training.distributed import Processes
from qpack.training.log_probs import give_loss
from qpack.training.loraplus import raise_rate_of_b
from qpack.training.memory import peak_memory
from qpack.training.model import require_float32_adapter
from qpack.training.packed_linear import decoded_in_rust
from qpack.training.paging import page_again
from qpack.training.report import BatchHalved, EvalLog, Event, Listener, Rewards, RunBegin, StepLog
from qpack.training.settings import TrainSettings, checkpointing
from qpack.training.trackers import trackers

UNPAGED = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "adamw_torch"}
"""What stands for a paged optimizer on a CPU, which has no second memory to page to: the same update, unpaged."""

CHECKPOINTS = 20
"""How many a run saves if it isn't told, so that little is lost when it is interrupted,"""
MOST_BETWEEN = 100
"""and after how many steps at the latest."""
EVALUATIONS = 10
"""How many a run makes if it isn't told."""


@dataclass(frozen=True, slots=True)
class Steps:
    """What the steps of a run came to, those before an interruption included."""

    losses: list[float]
    tokens: int
    seconds: float
    resumed: int
    """The steps of them that an interrupted run had done."""
    best: int | None
    """After which step the loss on the data held out was lowest: the adapter's step."""
    best_loss: float | None


def optimizer_for(settings: TrainSettings, compute: Compute) -> str:
    """Return the optimizer that the device can run for the one asked for."""
    return settings.optim if compute.device == "cuda" else UNPAGED.get(settings.optim, settings.optim)


def fit(
    model: PeftModel,
    examples: Sequence[Any],
    settings: TrainSettings,
    compute: Compute,
    *,
    held_out: Sequence[Any] = (),
    directory: Path,
    name: str | None = None,
    trainer_class: "type[AdapterTrainer] | None" = None,
    processes: Processes = Processes(),  # noqa: B008  # frozen
    listeners: Sequence[Listener] = (),
) -> Steps:
    """Train the adapter in place, or go on from the last checkpoint in ``directory``, where new ones are saved.

    With examples held out, the model is left with the adapter of the step after which their loss was lowest. ``name``
    is what trackers call the run.

    Raises:
        TrainingError: the loss or a gradient is no longer finite, memory does not suffice for one sequence, the warm-up
            is longer than the run, or LoRA is not in float32.
    """
    checkpoints = Checkpoints(directory, settings.keep)
    arguments = _arguments(settings, compute, directory, name, evaluate=bool(held_out))
    make = trainer_class or AdapterTrainer
    examples, held_out = (make.arrange(part, settings) for part in (examples, held_out))
    trainer = make(model, arguments, examples, held_out, settings, checkpoints, processes, listeners)
    require_float32_adapter(model)
    resumed = checkpoints.latest()
    done = _state(resumed) if resumed else TrainerState()
    if resumed and _finished(done):
        trainer._load_from_checkpoint(str(resumed))
        trainer.state = done
    else:
        if processes.first:
            for callback in trackers(settings.report_to, directory.parent, done.global_step):
                trainer.add_callback(callback)
        try:
            with decoded_in_rust(model):
                trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        except Exception as error:
            if not _out_of_memory(error):
                raise
            raise TrainingError(f"out of memory outside the passes over the model: {_one_line(error)}") from error
    state = trainer.state
    if state.best_global_step:
        trainer._load_from_checkpoint(str(checkpoints.path(state.best_global_step)))
    logs = [log for log in state.log_history if "loss" in log]
    return Steps(
        losses=[log["loss"] for log in logs],
        tokens=state.num_input_tokens_seen,
        seconds=sum(log["seconds"] for log in logs),
        resumed=done.global_step,
        best=state.best_global_step,
        best_loss=state.best_metric,
    )


def _arguments(
    settings: TrainSettings, compute: Compute, directory: Path, name: str | None, *, evaluate: bool
) -> TrainingArguments:
    on_gpu = compute.device == "cuda"
    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=optimizer_for(settings, compute),
        seed=settings.seed,
        use_cpu=not on_gpu,
        bf16=compute.dtype == torch.bfloat16,
        fp16=compute.dtype == torch.float16,
        gradient_checkpointing=checkpointing(settings, compute.device),
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        run_name=name,
        report_to="none",  # `trackers` makes their callbacks, which have to know where the run goes on
        eval_strategy="steps" if evaluate else "no",  # how many, _Watch tells, here and for saving
        metric_for_best_model="loss" if evaluate else None,
        save_strategy="steps",
        save_total_limit=None,  # Checkpoints deletes them
    )
    arguments._n_gpu = 1  # the model is on one device; the Trainer would multiply the batch by those beside it
    return arguments


class AdapterTrainer(Trainer):
    """The Trainer with the differences that the module's docstring names."""

    collate: Callable[[Sequence[Any]], Batch] = staticmethod(collate)
    """Makes a batch of examples."""
    give: Callable[[PreTrainedModel], bool] = staticmethod(give_loss)
    """Makes the base give, for labels, what the loss is computed from, without its logits, and returns whether it
    does."""

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        examples: Sequence[Any],
        held_out: Sequence[Any],
        settings: TrainSettings,
        checkpoints: Checkpoints,
        processes: Processes,
        listeners: Sequence[Listener],
    ) -> None:
        """Take what is constant for the run."""
        self.settings = settings
        self.checkpoints = checkpoints
        self.processes = processes
        self.listeners = listeners
        self.order = Order(
            lengths=[*map(self.length, examples)],
            group_size=settings.batch_size * settings.grad_accum * processes.size if settings.group_by_length else 1,
            seed=args.seed,
        )
        self.passes: list[Pass] = []
        self.began = time.perf_counter()
        given = self.give(cast(PreTrainedModel, model.get_base_model()))
        super().__init__(
            model=model,
            args=args,
            train_dataset=examples,
            eval_dataset=held_out or None,
            data_collator=self.collate,
            callbacks=[_Watch(self)],
        )
        # The Trainer goes by what the model declares, and would take means of batches where that is nothing.
        self.model_accepts_loss_kwargs |= given
        self.remove_callback(PrinterCallback)  # without a progress bar the Trainer prints its log

    @staticmethod
    def arrange(examples: Sequence[Any], settings: TrainSettings) -> Sequence[Any]:
        """What the rows of batches are made of: the examples as they are."""
        return examples

    @staticmethod
    def length(example: Any) -> int:
        """What an example costs, in tokens."""
        return len(example["input_ids"])

    @staticmethod
    def items(batch: Batch) -> int:
        """Over how many items the loss of a batch is a sum: its learned tokens."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def step_rewards(self) -> Rewards | None:
        """What the answers of the step were rewarded with, if it is answers that are compared."""
        return None

    def tell(self, event: Event) -> None:
        """Pass an event to all listeners."""
        for listener in self.listeners:
            listener(event)

    # ---- a step --------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer, with a rate of their own for the B matrices if the settings give them one."""
        adapted: Any = self.model
        made: torch.optim.Optimizer = super().create_optimizer(model)
        if ratio := self.settings.loraplus_lr_ratio:
            raise_rate_of_b(made, adapted, ratio)
        return made

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> int:
        """Count over how many items the loss of a step is a sum, in all processes."""
        return sum(self.processes.gathered(sum(map(self.items, batch_samples))))

    def begin_step(self) -> None:
        """Forget the last step."""
        self.passes = []
        self.began = time.perf_counter()

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run a batch forward and backward, in as many parts as memory asks for, and return its share of the loss."""
        self.passes.append(Pass(inputs))
        todo = self.passes[-1:]
        while True:
            try:
                for batch in todo:
                    parts = cut(batch.inputs, self.rows())
                    losses = [
                        super(AdapterTrainer, self).training_step(model, part, num_items_in_batch) for part in parts
                    ]
                    batch.loss = torch.stack(losses).sum()
                break
            except Exception as error:
                if not _out_of_memory(error):
                    raise
                self._halve(error)
            # Out of the except clause, so that nothing holds the tensors of the failed pass any more. What it has added
            # to the gradients is unknown: the step begins anew.
            clear_device_cache(garbage_collection=True)
            model.zero_grad()
            todo = self.passes
        return self.passes[-1].loss

    def rows(self) -> int:
        """How many sequences go through the model at once. Checkpoints keep it: a resumed run does no other."""
        return int(self.state.train_batch_size or self.settings.batch_size)

    def _halve(self, error: BaseException) -> None:
        rows = self.rows()
        step = self.state.global_step + 1
        if self.args.world_size > 1:
            raise TrainingError(
                f"out of memory in step {step}: lower batch_size {self.settings.batch_size}; with several processes it "
                "cannot be done for one of them alone"
            ) from error
        if rows == 1:
            raise TrainingError(
                f"out of memory in step {step} with one sequence at a time; lower max_length "
                f"{self.settings.max_length} or the rank of the adapter"
            ) from error
        self.state.train_batch_size = math.ceil(rows / 2)
        parts = math.ceil(self.settings.batch_size / self.rows())
        self.tell(BatchHalved(step, self.rows(), parts * self.settings.grad_accum))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Check and tell one step."""
        if "loss" in logs:
            self._require_finite(logs)
            seconds = time.perf_counter() - self.began
            tokens = sum(self.processes.gathered(sum(batch.inputs["tokens"] for batch in self.passes)))
            self.state.num_input_tokens_seen += tokens
            step = StepLog(
                step=self.state.global_step,
                total=self.state.max_steps,
                loss=logs["loss"],
                lr=logs["learning_rate"],
                grad_norm=logs["grad_norm"],
                tokens=tokens,
                tokens_per_second=tokens / seconds,
                seconds=seconds,
                memory=peak_memory(self.args.device.type),
                rewards=self.step_rewards(),
            )
            logs |= {name: getattr(step, name) for name in ("tokens_per_second", "seconds", "memory")}
            if step.rewards:
                logs |= {f"rewards/{name}": value for name, value in asdict(step.rewards).items()}
            super().log(logs)
            self.tell(step)

    def _require_finite(self, logs: dict[str, float]) -> None:
        # With float16 an infinite gradient is how the gradient scaler finds its scale: it skips the step by itself.
        checked = ("loss",) if self.args.fp16 else ("loss", "grad_norm")
        for name in checked:
            if not math.isfinite(logs[name]):
                rows = self._rows(lambda batch: not batch.loss.isfinite()) or self._rows(lambda batch: True)
                raise TrainingError(
                    f"{name} is {logs[name]} at step {self.state.global_step} of {self.state.max_steps}, learning rate "
                    f"{logs['learning_rate']:g}, rows {_listed(rows)}; lower the learning rate or look for broken "
                    "weights in the base"
                )

    def _rows(self, chosen: "Callable[[Pass], bool]") -> list[str]:
        """Where the data of the step comes from, of all processes."""
        batches = filter(chosen, self.passes)
        own = [origin for batch in batches for origin in batch.inputs["origins"]]
        return [origin for origins in self.processes.gathered(own) for origin in origins]

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Do what accelerate does to a model that is trained by several processes, but for the base."""
        if self.processes.size == 1 or not training or model is not self.model:
            return super()._wrap_model(model, training, dataloader)
        prepared = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return average_gradients(prepared)

    # ---- evaluation ----------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the mean loss over all items that are held out. No random number is drawn."""
        held_out: Any = self.eval_dataset
        model: Any = self.model
        begins = range(0, len(held_out), self.rows())
        own = begins[self.processes.rank :: self.processes.size]
        loss, items = 0.0, 0
        model.eval()
        # Processes that share a base go through it together: who has no batch left runs its first one again.
        for turn in range(math.ceil(len(begins) / self.processes.size)):
            begin = own[turn] if turn < len(own) else begins[0]
            batch = self.collate(held_out[begin : begin + self.rows()])
            [inputs] = cut(batch, self.rows())
            with torch.no_grad():
                mean: Any = self.compute_loss(model, self._prepare_inputs(inputs))
            if turn < len(own):
                loss += mean.item() * self.items(batch)
                items += self.items(batch)
        sums = self.processes.gathered((loss, items))
        metrics = {"eval_loss": sum(loss for loss, _ in sums) / sum(items for _, items in sums)}
        super().log(dict(metrics))  # for trackers
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save what is best, so that it is there to be published, and stop when nothing has been for long enough."""
        step, loss = self.state.global_step, metrics["eval_loss"]
        if not math.isfinite(loss):
            raise TrainingError(f"the loss on the data held out is {loss} after step {step} of {self.state.max_steps}")
        best: bool = super()._determine_best_metric(metrics, trial)
        self.tell(EvalLog(step, self.state.max_steps, loss, best))
        self.control.should_save |= best
        if patience := self.settings.early_stopping:
            unimproved = step - (self.state.best_global_step or 0)
            self.control.should_training_stop |= unimproved >= patience * self.state.eval_steps
        return best

    # ---- checkpoints ---------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.processes.shared(self.checkpoints.saving) as unfinished:
            final, self.args.output_dir = self.args.output_dir, str(unfinished)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = final
        if self.processes.first:
            self.checkpoints.drop_old(self.state.best_global_step)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        save_adapter(self.accelerator.unwrap_model(self.model), Path(str(output_dir)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.optimizer:
            page_again(self.optimizer)


@dataclass(slots=True)
class Pass:
    """A batch on its way through the model."""

    inputs: Batch
    loss: torch.Tensor = field(default_factory=lambda: torch.tensor(torch.nan))
    """Its share of the loss of the step, once it is through."""


class _Watch(TrainerCallback):
    """Tells the trainer where its loop is."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a warm-up that never ends."""
        if args.warmup_steps >= state.max_steps:
            raise TrainingError(
                f"warmup_steps {args.warmup_steps:g}: the run has {state.max_steps} steps, so the learning rate "
                f"would never reach {args.learning_rate}; lower warmup_steps"
            )
        by_length = min(MOST_BETWEEN, math.ceil(state.max_steps / CHECKPOINTS))
        state.save_steps = self.trainer.settings.save_steps or by_length
        state.eval_steps = self.trainer.settings.eval_steps or math.ceil(state.max_steps / EVALUATIONS)
        self.trainer.tell(RunBegin(state.global_step, state.max_steps))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the order; accelerate does not pass an epoch on to the sampler of a resumed one."""
        self.trainer.order.epoch = int(state.epoch or 0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a step."""
        self.trainer.begin_step()


def _state(checkpoint: Path) -> TrainerState:
    state: TrainerState = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state


def _finished(state: TrainerState) -> bool:
    """Whether the run that saved this had decided to stop: at its last step, or earlier."""
    callbacks: Any = state.stateful_callbacks
    return bool(callbacks["TrainerControl"]["args"]["should_training_stop"])


def _out_of_memory(error: BaseException) -> bool:
    """Whether it is what a GPU, torch's CPU allocator or Python raises."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


def _listed(rows: Sequence[str], most: int = 4) -> str:
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return ", ".join(rows[:most]) + more


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
