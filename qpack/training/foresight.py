"""What a run is going to take, told before its first step: `qpack.estimate` with the data as it is.

Its lengths are those of the data where that is shorter than ``max_length``, and a batch is no larger than the data. A
model whose shapes the estimate cannot read is trained without one.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qpack.checkpoint import Checkpoint
from qpack.data import pack
from qpack.errors import CheckpointError
from qpack.estimate import Device, Fit, Model, fit
from qpack.training.distributed import Processes
from qpack.training.settings import TrainSettings

logger = logging.getLogger(__name__)


def foresee(base: Path, settings: TrainSettings, examples: Sequence[Any], processes: Processes) -> Fit | None:
    """Size the run for one of ``processes`` on its device, with what is free there now."""
    try:
        model = Model.open(Checkpoint.open(base))
    except CheckpointError as error:
        logger.warning("no estimate of the memory: %s", error)
        return None
    return fit(model, _as_data(settings, examples), Device.here(), processes.size)


def _as_data(settings: TrainSettings, examples: Sequence[Any]) -> TrainSettings:
    """The settings, none larger than the data makes it."""
    if settings.method == "dpo":
        lengths = [max(len(side["input_ids"]) for side in (pair["chosen"], pair["rejected"])) for pair in examples]
    else:
        lengths = [len(example["input_ids"]) for example in examples]
    shared = False
    if settings.packing:
        packs = pack(lengths, settings.max_length)
        shared = len(packs) < len(lengths)
        lengths = [sum(lengths[place] for place in places) for places in packs]
    return replace(
        settings,
        packing=shared,  # a sequence that has a row for itself needs no mask there
        max_length=min(settings.max_length, max(lengths)),
        batch_size=min(settings.batch_size, len(lengths)),
    )
