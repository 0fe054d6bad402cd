"""Several processes that train one adapter: how they were started, who writes, and what each holds.

``torchrun`` and ``accelerate launch`` start N processes and tell each by environment variables who it is. All of them
train on their own share of every batch, and the adapter's gradients are averaged before each step, so that N processes
do what one does with a batch N times as large. Of the base, which is frozen, each holds

- everything: the default (DDP), or
- 1/N: with ``fsdp``, for a base that one device cannot hold (FSDP2, `qpack.loading.sharded`).

The adapter, its gradients and the optimizer's state are whole in every process in both cases. They are small, and so
optimizers, clipping and checkpoints are those of one process; a checkpoint holds nothing that depends on N.

Rank 0 reads the data, writes, and reports; the others get from it what they need, and stop when it stops.

Refused: launchers' own FSDP and DeepSpeed, which leave packed weights whole (accelerate 1.15 with a warning only), and
``fsdp`` without a second process to share with.
"""

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from qpack.errors import TrainingError
from qpack.training.settings import TrainSettings

T = TypeVar("T")

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}

_LONGEST_WAIT = timedelta(hours=2)
"""Other ranks wait while rank 0 reads the data; torch gives up after ten minutes by default."""

_OTHERS_PLANS = {
    "ACCELERATE_USE_FSDP": "FSDP would leave the packed weights whole in every process; use qpack's own fsdp setting",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed cannot shard packed weights; use qpack's fsdp setting",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM cannot load packed weights",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "its parallelism cannot shard packed weights; use qpack's fsdp setting",
}
"""What accelerate's config can ask for, and why it is refused rather than left out."""


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run, as one of them sees them. Alone, all that it does is done at once."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """The rank among those of this machine: the number of its GPU."""

    @classmethod
    def launched(cls, environment: Mapping[str, str] = os.environ) -> "Processes":
        """Read what the launcher has set; without one there is one process.

        Raises:
            TrainingError: it has set a part of it only, or asks for what would not be done.
        """
        for name, reason in _OTHERS_PLANS.items():
            if environment.get(name, "false").lower() == "true":
                raise TrainingError(f"{name.lower()} is set by accelerate's config: {reason}")
        size = int(environment.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        for name in ("RANK", "LOCAL_RANK"):
            if name not in environment:
                raise TrainingError(f"WORLD_SIZE is {size} but {name} is not set; start with torchrun")
        return cls(int(environment["RANK"]), size, int(environment["LOCAL_RANK"]))

    @property
    def first(self) -> bool:
        """Whether this one writes and reports."""
        return self.rank == 0

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Let the processes talk to each other for the block, over NCCL or, without a GPU for each, gloo."""
        if self.size == 1:
            yield
            return
        import torch
        from torch import distributed

        on_gpu = torch.cuda.is_available()
        if on_gpu:
            if self.local_rank >= torch.cuda.device_count():
                raise TrainingError(
                    f"rank {self.rank}: wants GPU {self.local_rank} of this machine, which has "
                    f"{torch.cuda.device_count()}; start one process a GPU"
                )
            torch.cuda.set_device(self.local_rank)
        joined = not distributed.is_initialized()  # a program that calls us may have done so
        if joined:
            device = torch.device("cuda", self.local_rank) if on_gpu else None
            backend = BACKENDS["cuda" if on_gpu else "cpu"]
            distributed.init_process_group(backend, timeout=_LONGEST_WAIT, device_id=device)
        yield
        if joined:  # after an error the others may never come: the process ends without
            distributed.destroy_process_group()
            # Gloo's threads end with the last reference to the group, which a model's cycles hold. What they free while
            # the interpreter shuts down aborts the process (pytorch/pytorch pull 179291).
            gc.collect()

    def once(self, function: Callable[[], T]) -> T:
        """Call ``function`` in rank 0 alone, and return what it returned in all of them.

        Raises:
            TrainingError: in the others, if it raised; rank 0 raises what it raised.
        """
        if self.size == 1:
            return function()
        from torch.distributed import broadcast_object_list

        told: list[Any] = [False, None]
        if self.first:
            try:
                told = [True, function()]
            finally:
                broadcast_object_list(told, src=0)
        else:
            broadcast_object_list(told, src=0)
            if not told[0]:
                raise TrainingError(f"rank {self.rank}: stopped because rank 0 did, which says why")
        result: T = told[1]
        return result

    def gathered(self, value: T) -> list[T]:
        """The ``value`` of every process, by rank."""
        if self.size == 1:
            return [value]
        from torch.distributed import all_gather_object

        values: list[Any] = [None] * self.size
        all_gather_object(values, value)
        return values

    @contextmanager
    def shared(self, context: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
        """Enter a context in rank 0, for all: it is left when all are through with the block, before any goes on."""
        with ExitStack() as stack:
            yield self.once(lambda: stack.enter_context(context()))
            self.gathered(None)
        self.gathered(None)

    def describe(self, settings: TrainSettings, device: str) -> str:
        """Say in a line what several processes will do."""
        share = f"FSDP2, each holds 1/{self.size} of the base" if settings.fsdp else "DDP, each holds the whole base"
        sequences = settings.batch_size * self.size * settings.grad_accum
        batch = f"{settings.batch_size} x {self.size} x {settings.grad_accum} = {sequences} sequences a step"
        return f"{self.size} processes ({BACKENDS[device]}, {device}): {share}; {batch}"
