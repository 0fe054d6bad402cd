"""LoRA fine-tuning on a packed base: one call from a directory and a JSONL file to an adapter.

Importing this package loads neither torch nor transformers; :func:`train` does so once its input has been checked.
"""

from qpack.training.report import BatchHalved, EvalLog, Event, RunBegin, StepLog, TrainReport
from qpack.training.run import train
from qpack.training.settings import TrainSettings, load_settings

__all__ = [
    "BatchHalved",
    "EvalLog",
    "Event",
    "RunBegin",
    "StepLog",
    "TrainReport",
    "TrainSettings",
    "load_settings",
    "train",
]
