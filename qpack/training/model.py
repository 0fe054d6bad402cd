"""The model under training: the packed base in the chosen compute dtype, with float32 LoRA on all linear layers.

The base is frozen as it was packed; only the adapter is float32. LoRA in bfloat16, the default of some trainers on a
4-bit base, loses most small updates: at learning rate 1e-5 93 % of them round to nothing.
"""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qpack.errors import CheckpointError, TrainingError
from qpack.loading.model import load
from qpack.training.compute import Compute
from qpack.training.settings import TrainSettings


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base directory.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{base}: no tokenizer that can be loaded: {_one_line(error)}") from error
    return tokenizer


def load_base(base: Path, compute: Compute, *, sharded: bool = False) -> PreTrainedModel:
    """Load a packed checkpoint for training, or the part of it that is this process's.

    The compute dtype is ours, not the one that its config.json suggests to whoever loads it: that one was chosen on
    the machine that packed the model.

    Raises:
        CheckpointError: the checkpoint cannot be read, or lacks or has more tensors than the model.
    """
    # accelerate compares the device with its own, which has a number.
    device = f"cuda:{torch.cuda.current_device()}" if compute.device == "cuda" else compute.device
    return load(base, dtype=compute.dtype, device_map={"": device}, sharded=sharded)


def add_lora(model: PreTrainedModel, settings: TrainSettings) -> PeftModel:
    """Freeze the base and put float32 LoRA on every linear layer but the output head."""
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)  # bfloat16 to float32
    # PEFT resolves the targets to a set, which would be saved in a different order in every process.
    config.target_modules = sorted(config.target_modules or ())
    return adapted


def require_float32_adapter(model: torch.nn.Module) -> None:
    """Refuse to train an adapter that something has cast.

    Raises:
        TrainingError: a trainable parameter is not float32.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise TrainingError(f"{name}: expected a float32 LoRA weight, found {parameter.dtype}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
