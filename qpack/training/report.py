"""What training tells: one record a step while it runs, one report when it is done."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class StepLog:
    """One optimizer step.

    ``loss`` is the mean over the step's learned tokens, ``lr`` the rate the step used, and ``tokens_per_second``
    counts the tokens of the batch without its padding.
    """

    step: int
    total: int
    loss: float
    lr: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class TrainReport:
    """One finished run.

    ``examples`` are sequences, ``truncated`` how many of them were cut at ``max_length``, ``tokens`` all tokens the
    model was fed without padding. ``final_loss`` is the mean of the last ten steps (of all, if there were fewer).
    ``seconds`` covers the steps alone, not loading. ``optimizer`` and ``compute_dtype`` are those that were used.
    """

    output: Path
    steps: int
    examples: int
    truncated: int
    tokens: int
    trainable_parameters: int
    first_loss: float
    final_loss: float
    seconds: float
    tokens_per_second: float
    compute_dtype: str
    optimizer: str
