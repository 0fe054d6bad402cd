"""The model under training: the base in the chosen compute dtype, with float32 LoRA on its linear layers.

The base is frozen as it was stored; only the adapter is float32. LoRA in bfloat16, the default of some trainers on a
4-bit base, loses most small updates: at learning rate 1e-5 93 % of them round to nothing.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qpack.errors import TrainingError
from qpack.loading.experts import holds_fused_experts
from qpack.loading.model import load, load_plain
from qpack.training.compute import Compute
from qpack.training.settings import TrainSettings, names_in
from qpack.training.whole_modules import find_whole_modules, make_float32, stays_tied

_ADAPTABLE = (torch.nn.Linear, Conv1D, torch.nn.Embedding)
"""What a regular expression may put LoRA on."""


def load_base(base: Path, compute: Compute, *, plain: bool = False, sharded: bool = False) -> PreTrainedModel:
    """Load a packed or a ``plain`` checkpoint for training, or the part of it that is this process's.

    The compute dtype is ours, not the one that its config.json suggests to whoever loads it: that one was chosen on
    the machine that packed the model.

    Raises:
        CheckpointError: the checkpoint cannot be read, or lacks or has more tensors than the model.
    """
    # accelerate compares the device with its own, which has a number.
    device = f"cuda:{torch.cuda.current_device()}" if compute.device == "cuda" else compute.device
    if plain:
        return load_plain(base, dtype=compute.dtype, device_map={"": device})
    return load(base, dtype=compute.dtype, device_map={"": device}, sharded=sharded)


def add_lora(model: PreTrainedModel, settings: TrainSettings) -> PeftModel:
    """Freeze the base and put float32 LoRA on the layers that the settings name, and copies of what is trained whole.

    Raises:
        TrainingError: a name or a pattern matches no linear layer of the model, or also something else, or a module
            cannot be trained.
    """
    require_targets(model, settings)
    names = names_in(settings.target_modules)
    whole = find_whole_modules(model, settings)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=names or settings.target_modules,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        modules_to_save=whole or None,
        ensure_weight_tying=stays_tied(model, whole),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")  # refused below
        try:
            adapted = get_peft_model(model, config, autocast_adapter_dtype=True)  # bfloat16 to float32
        except ValueError as error:  # PEFT has rules for some families
            raise TrainingError(f"target_modules: {_one_line(error)}") from error
    make_float32(adapted)
    chosen = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(settings, field):
            _require_match(field, pattern, pattern, chosen)
    if not isinstance(config.target_modules, str):
        # PEFT resolves the targets to a set, which would be saved in a different order in every process.
        config.target_modules = sorted(config.target_modules or ())
    return adapted


def require_targets(model: torch.nn.Module, settings: TrainSettings) -> None:
    """Refuse ``target_modules`` that name what LoRA cannot be put on; ``model`` may be on the meta device.

    Raises:
        TrainingError: a name or a pattern matches no linear layer of the model, or also something else.
    """
    names = names_in(settings.target_modules)
    if settings.target_modules == "all-linear" and holds_fused_experts(model):
        raise TrainingError(
            "target_modules: all-linear does not reach experts of which a layer has all in one tensor; name the layers "
            "to adapt, or pack the base, in which each expert has linear layers of its own"
        )
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in names:
        _require_match("target_modules", name, re.escape(name), linear)
    if settings.target_modules != "all-linear" and not names:
        _require_match("target_modules", settings.target_modules, settings.target_modules, linear, whole=True)
        _refuse_others(model, settings)


def _require_match(setting: str, given: str, pattern: str, modules: Sequence[str], *, whole: bool = False) -> None:
    """Refuse what matches none of ``modules``, by its end or its ``whole`` name: PEFT's rules."""
    matcher = re.compile(pattern if whole else rf"(.*\.)?({pattern})")
    if not any(map(matcher.fullmatch, modules)):
        ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in modules))
        raise TrainingError(f"{setting}: '{given}' matches no linear layer; they end in {ends}, such as {modules[0]}")


def _refuse_others(model: torch.nn.Module, settings: TrainSettings) -> None:
    """Refuse a pattern that also matches what LoRA is not put on; what is trained whole gets none anyway."""
    pattern, whole = settings.target_modules, names_in(settings.modules_to_save or "")
    for name, module in model.named_modules():
        if isinstance(module, _ADAPTABLE) or any(f".{name}".endswith(f".{end}") for end in whole):
            continue
        if re.fullmatch(pattern, name):
            raise TrainingError(
                f"target_modules: '{pattern}' matches '{name}' too, which is a {type(module).__name__}, not a linear "
                "layer; end it so that it matches linear layers alone"
            )


def require_float32_adapter(model: torch.nn.Module) -> None:
    """Refuse to train an adapter that something has cast.

    Raises:
        TrainingError: a trainable parameter is not float32.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise TrainingError(f"{name}: expected a float32 weight, found {parameter.dtype}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
