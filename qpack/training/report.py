"""What training tells: an event for everything that happens while it runs, one report when it is done."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the estimate reads our settings
    from qpack.estimate import Fit, Need


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What the run is going to take, and whether the device has it. Told before the base is loaded."""

    fit: "Fit"


@dataclass(frozen=True, slots=True)
class RunBegin:
    """The first step is about to begin. ``step`` of ``total`` were done by an interrupted run that this one goes on."""

    step: int
    total: int


@dataclass(frozen=True, slots=True)
class Rewards:
    """What DPO's pairs of a step were rewarded with, on average: beta times the log-probability gained over the base.

    ``margin`` is the difference, and ``accuracy`` the share of the pairs whose chosen answer is rewarded more.
    """

    chosen: float
    rejected: float
    margin: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class StepLog:
    """One optimizer step.

    ``loss`` is the mean over the step's learned tokens (DPO: over its pairs), ``lr`` the rate the step used,
    ``grad_norm`` the norm of the gradient before it was clipped, and ``tokens`` counts those of the batch without its
    padding. ``memory`` is in bytes, the most that the run has taken so far. ``rewards`` are DPO's.
    """

    step: int
    total: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float
    memory: int
    rewards: Rewards | None = None


@dataclass(frozen=True, slots=True)
class EvalLog:
    """One evaluation, after ``step``: ``loss`` is the mean over all learned tokens that were held out."""

    step: int
    total: int
    loss: float
    best: bool
    """Whether it is the lowest so far."""


@dataclass(frozen=True, slots=True)
class BatchHalved:
    """Memory ran out in ``step``: from here on a forward pass takes ``batch_size`` sequences and a step more passes."""

    step: int
    batch_size: int
    grad_accum: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt of the data with its answers, as text; special tokens are shown."""

    prompt: str
    expected: str
    """What the data answers."""
    before: str
    """What the base answers."""
    after: str
    """What the base answers with the adapter."""


Event = Foreseen | RunBegin | StepLog | EvalLog | BatchHalved
Listener = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class TrainReport:
    """One finished run.

    ``examples`` are sequences, ``truncated`` how many of them were cut at ``max_length``, ``skipped`` the rows of the
    data that could not be used (``on_bad_row='skip'``), ``tokens`` all tokens the model was fed without padding.
    ``final_loss`` is the mean of the last ten steps (of all, if there were fewer). ``seconds`` covers the steps alone,
    not loading, saving or evaluating. Counts, losses and seconds are those of the whole run, the part before an
    interruption included; ``resumed_step`` is where this call went on. ``optimizer`` and ``compute_dtype`` are those
    that were used. With data held out, the adapter is that of ``best_step``, whose loss on that data is
    ``best_eval_loss``. ``peak_memory`` is in bytes, of this process, and ``estimated_memory`` what was foreseen of it,
    by parts; None where the model's shapes could not be read.
    """

    output: Path
    steps: int
    examples: int
    truncated: int
    skipped: int
    tokens: int
    trainable_parameters: int
    first_loss: float
    final_loss: float
    seconds: float
    tokens_per_second: float
    compute_dtype: str
    optimizer: str
    peak_memory: int
    estimated_memory: "Need | None"
    resumed_step: int
    best_step: int | None
    best_eval_loss: float | None
