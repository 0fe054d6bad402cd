"""The model under training: the packed base in the chosen compute dtype, with float32 LoRA on all linear layers.

The base is frozen as it was packed; only the adapter is float32. LoRA in bfloat16, the default of some trainers on a
4-bit base, loses most small updates: at learning rate 1e-5 93 % of them round to nothing.

On a CPU with AVX512-BF16 one forward pass outside training makes bitsandbytes repack every weight in place for an
inference kernel that has no gradient, in a layout that no other code reads. Training then goes wrong without an error:
on the tests' model, in float32 and bfloat16 alike, the loss is as before (6.38) and the gradient norm 0.92, not 4.54.
:func:`keep_weights_in_place` turns the repacking off, which gives bit for bit the gradients of a run without that pass.
"""

from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qpack.errors import CheckpointError, TrainingError
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


def load_base(base: Path, compute: Compute) -> PreTrainedModel:
    """Load a packed checkpoint for training.

    The compute dtype is ours, not the one that its config.json suggests to whoever loads it: that one was chosen on
    the machine that packed the model.

    Raises:
        CheckpointError: the checkpoint cannot be read, or lacks or has more tensors than the model.
    """
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
        config.quantization_config["bnb_4bit_compute_dtype"] = compute.dtype_name
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base,
            config=config,
            dtype=compute.dtype,
            device_map={"": compute.device},
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{base}: cannot be loaded: {_one_line(error)}") from error
    model: PreTrainedModel
    model, loading = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            raise CheckpointError(f"{base}: {kind.replace('_', ' ')}: {', '.join(map(str, sorted(loading[kind])))}")
    keep_weights_in_place(model)
    return model


def keep_weights_in_place(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking the 4-bit weights in a forward pass outside training.

    Raises:
        TrainingError: this bitsandbytes has no such switch, so that nothing is known about its repacking.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            if not hasattr(layer, "support_avx512bf16_for_cpu"):
                raise TrainingError(
                    f"{name}: bitsandbytes {bitsandbytes.__version__} has no support_avx512bf16_for_cpu to turn off; "
                    "its CPU weight repacking may break training"
                )
            layer.support_avx512bf16_for_cpu = False


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
