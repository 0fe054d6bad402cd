"""Trackers that show a run while it lasts and beside others: TensorBoard, Weights & Biases, MLflow.

They are transformers' own callbacks, with the environment variables that those read. Only the first process reports.

A run that was interrupted and gone on with has each step once in TensorBoard: the log tells where it was taken up, and
what it says of later steps no longer counts. The other two get a new run of the same name, which begins with the
first step after the checkpoint; with WANDB_RUN_ID and WANDB_RESUME, or MLFLOW_RUN_ID, they go on with the old one.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qpack.errors import TrainingError

if TYPE_CHECKING:
    from transformers import TrainerCallback

LOGS_NAME = "runs"
"""TensorBoard's directory beside the adapter, unless TENSORBOARD_LOGGING_DIR names another: torch's own name for it."""


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package, which has the same name, is not installed.

    Raises:
        TrainingError: naming the first of them, and how to install it.
    """
    for name in names:
        if find_spec(name) is None:
            raise TrainingError(f"report_to: {name} is not installed; pip install {name}")


def trackers(names: Sequence[str], directory: Path, resumed: int) -> "list[TrainerCallback]":
    """Make the callbacks of a run that works in ``directory`` and goes on after step ``resumed``."""
    from transformers.integrations.integration_utils import MLflowCallback, TensorBoardCallback, WandbCallback

    made: list[TrainerCallback] = []
    for name in names:
        if name == "tensorboard":
            from torch.utils.tensorboard.writer import SummaryWriter

            logs = os.environ.get("TENSORBOARD_LOGGING_DIR") or directory / LOGS_NAME
            writer = SummaryWriter(str(logs), purge_step=resumed + 1)
            made.append(TensorBoardCallback(writer))
        else:
            made.append({"wandb": WandbCallback, "mlflow": MLflowCallback}[name]())  # type: ignore[no-untyped-call]
    return made
