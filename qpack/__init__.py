"""qpack: a Hugging Face checkpoint's whole 4-bit life: pack, fine-tune, serve, merge.

Each command of the ``qpack`` program is one function here, with a typed result. Names are imported when first used:
``convert``, ``merge`` and ``inspect`` need nothing but the Rust extension; only ``train`` and ``load`` import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from qpack.errors import (
    AdapterError,
    CheckpointError,
    DataError,
    OutputExistsError,
    QpackError,
    ServeError,
    TrainingError,
)

if TYPE_CHECKING:
    __version__: str
    from qpack.adapter import Adapter
    from qpack.checkpoint import Checkpoint
    from qpack.conversion import ConvertReport, convert
    from qpack.inspection import Inspection, inspect
    from qpack.loading.model import load
    from qpack.merging import MergeReport, merge
    from qpack.training import TrainReport, TrainSettings, train

_HOMES = {
    "Adapter": "qpack.adapter",
    "Checkpoint": "qpack.checkpoint",
    "ConvertReport": "qpack.conversion",
    "Inspection": "qpack.inspection",
    "MergeReport": "qpack.merging",
    "TrainReport": "qpack.training",
    "TrainSettings": "qpack.training",
    "convert": "qpack.conversion",
    "inspect": "qpack.inspection",
    "load": "qpack.loading.model",
    "merge": "qpack.merging",
    "train": "qpack.training",
}

__all__ = [
    "Adapter",
    "AdapterError",
    "Checkpoint",
    "CheckpointError",
    "ConvertReport",
    "DataError",
    "Inspection",
    "MergeReport",
    "OutputExistsError",
    "QpackError",
    "ServeError",
    "TrainReport",
    "TrainSettings",
    "TrainingError",
    "__version__",
    "convert",
    "inspect",
    "load",
    "merge",
    "train",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("qpack._core").__version__
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qpack' has no attribute {name!r}")
