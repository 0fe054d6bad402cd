"""``modules_to_save``: modules of the base of which a float32 copy is trained whole, beside the LoRA of the others.

For what LoRA does not reach: embeddings and output head, when tokens get a new meaning, or norms. The copies are the
adapter's, and the base stays as it is. An output head that is tied to the input embedding stays tied: one copy stands
for both. PEFT makes and saves the copies, in the dtype of the base; here they are made float32, for the reason that
LoRA is.

Refused: what is in 4 bits, which has no gradient; what holds no weights but those of its parts.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import PreTrainedModel

from qpack.errors import TrainingError
from qpack.training.settings import TrainSettings, names_in


def find_whole_modules(model: PreTrainedModel, settings: TrainSettings) -> list[str]:
    """The full names of the modules that ``modules_to_save`` names by their ends, in the order of the model.

    Raises:
        TrainingError: a name matches none, or one that cannot be trained so.
    """
    found: list[str] = []
    for given in names_in(settings.modules_to_save or ""):
        end = re.compile(rf"(.*\.)?{re.escape(given)}")
        matching = {name: module for name, module in model.named_modules() if end.fullmatch(name)}
        if not matching:
            raise TrainingError(f"modules_to_save: '{given}' matches no module; they end in {_ends(model)}")
        for name, module in matching.items():
            _require_trainable(name, module)
        found += matching
    return [name for name, _ in model.named_modules() if name in found]


def stays_tied(model: PreTrainedModel, whole: Sequence[str]) -> bool:
    """Whether ``whole`` holds one of two modules with the same weight, so that its copy must be the other's too.

    Raises:
        TrainingError: they have names that PEFT does not know for such.
    """
    if not model.config.get_text_config().tie_word_embeddings:
        return False
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = [name for name, module in model.named_modules() if module in ends and name in whole]
    for name in tied:
        if name.rpartition(".")[2] not in EMBEDDING_LAYER_NAMES:
            raise TrainingError(f"modules_to_save: '{name}' is tied to another module, which PEFT would leave behind")
    return bool(tied)


def make_float32(model: PeftModel) -> None:
    """Cast the copies. What they take and give stays in the dtype of the base, so that all around them is as it was."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            dtype = next(module.original_module.parameters()).dtype
            copy = module.modules_to_save["default"].float()
            if dtype != torch.float32:
                copy.register_forward_pre_hook(lambda _, inputs: tuple(_cast(value, torch.float32) for value in inputs))
                copy.register_forward_hook(lambda _, inputs, output, dtype=dtype: _cast(output, dtype))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _require_trainable(name: str, module: nn.Module) -> None:
    if any(isinstance(part, Linear4bit) for part in module.modules()):
        raise TrainingError(f"modules_to_save: '{name}' is in 4 bits, of which there is no gradient to train it by")
    if not any(True for _ in module.parameters(recurse=False)):
        raise TrainingError(f"modules_to_save: '{name}' holds no weights of its own; name its parts")


def _ends(model: nn.Module) -> str:
    """The last parts of the names of what could be named."""
    able = (name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False)))
    ends = dict.fromkeys(name.rpartition(".")[2] for name in able)
    packed = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    return ", ".join(end for end in ends if end not in packed)
