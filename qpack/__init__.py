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
    DiskFullError,
    HubError,
    MergeError,
    OutputExistsError,
    QpackError,
    ServeError,
    TrainingError,
)

if TYPE_CHECKING:
    __version__: str
    from qpack.adapters.adapter import Adapter
    from qpack.adapters.combining import Combination
    from qpack.checkpoint import Checkpoint
    from qpack.conversion import ConvertReport, DryRun, convert, plan_conversion
    from qpack.data.survey import Survey, survey
    from qpack.inspection import Inspection, inspect
    from qpack.loading.model import load
    from qpack.merging.combined import CombineReport, combine
    from qpack.merging.merging import MergePlan, MergeReport, merge, plan_merge
    from qpack.packing import ConvertOptions
    from qpack.quantization import QuantizedWeight, dequantize, quantize
    from qpack.training import TrainReport, TrainSettings, train
    from qpack.verification import Verification, verify

_HOMES = {
    "Adapter": "qpack.adapters.adapter",
    "Checkpoint": "qpack.checkpoint",
    "Combination": "qpack.adapters.combining",
    "CombineReport": "qpack.merging.combined",
    "ConvertOptions": "qpack.packing",
    "ConvertReport": "qpack.conversion",
    "DryRun": "qpack.conversion",
    "Inspection": "qpack.inspection",
    "MergePlan": "qpack.merging.merging",
    "MergeReport": "qpack.merging.merging",
    "QuantizedWeight": "qpack.quantization",
    "Survey": "qpack.data.survey",
    "TrainReport": "qpack.training",
    "TrainSettings": "qpack.training",
    "Verification": "qpack.verification",
    "combine": "qpack.merging.combined",
    "convert": "qpack.conversion",
    "dequantize": "qpack.quantization",
    "inspect": "qpack.inspection",
    "load": "qpack.loading.model",
    "merge": "qpack.merging.merging",
    "plan_conversion": "qpack.conversion",
    "plan_merge": "qpack.merging.merging",
    "quantize": "qpack.quantization",
    "survey": "qpack.data.survey",
    "train": "qpack.training",
    "verify": "qpack.verification",
}

__all__ = [
    "Adapter",
    "AdapterError",
    "Checkpoint",
    "CheckpointError",
    "Combination",
    "CombineReport",
    "ConvertOptions",
    "ConvertReport",
    "DataError",
    "DiskFullError",
    "DryRun",
    "HubError",
    "Inspection",
    "MergeError",
    "MergePlan",
    "MergeReport",
    "OutputExistsError",
    "QpackError",
    "QuantizedWeight",
    "ServeError",
    "Survey",
    "TrainReport",
    "TrainSettings",
    "TrainingError",
    "Verification",
    "__version__",
    "combine",
    "convert",
    "dequantize",
    "inspect",
    "load",
    "merge",
    "plan_conversion",
    "plan_merge",
    "quantize",
    "survey",
    "train",
    "verify",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("qpack._core").__version__
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qpack' has no attribute {name!r}")
