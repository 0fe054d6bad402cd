"""What PEFT must know about a model whose experts are Linear layers, and the names under which its adapter is saved.

PEFT (0.21, ``utils/transformers_weight_conversion.py``) goes by the model type alone: on a Mixtral it takes an adapter
that names single experts for one from before transformers 5, and rewrites it for the fused experts that a model loaded
by qpack does not have. :func:`teach_peft` makes it leave such adapters as they are. For any other model it does what
it did.

``target_parameters`` is refused: it adapts a 3-D parameter, which would need all experts of a layer in 16 bits at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils import transformers_weight_conversion as conversion
from safetensors.torch import load_file, save_file

from qpack.errors import AdapterError
from qpack.loading.experts import has_experts
from qpack.loading.names import Names

_PREFIX = "base_model.model."
"""What PEFT puts before the name of a module in an adapter's file."""

_stock_config = conversion.convert_peft_config_for_transformers
_stock_state_dict = conversion.convert_peft_adapter_state_dict_for_transformers


def teach_peft() -> None:
    """Make PEFT take the experts of a model loaded by qpack for the Linear layers that they are. Safe to repeat."""
    conversion.convert_peft_config_for_transformers = _convert_config
    conversion.convert_peft_adapter_state_dict_for_transformers = _convert_state_dict


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Save the adapter as PEFT does, under the names that the base's checkpoint has for its modules.

    `qpack.merge` and vLLM look the modules up by those names. PEFT loads an adapter under either on a model from
    `qpack.load`.
    """
    model.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink()  # PEFT's model card, a form with nothing filled in
    if has_experts(model):
        names = Names(model.get_base_model())
        file = directory / SAFETENSORS_WEIGHTS_NAME
        weights = {_translate(name, names.in_checkpoint): tensor for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})


def _convert_config(peft_config: PeftConfig, model: torch.nn.Module, conversions: Any) -> None:
    if not has_experts(model):
        _stock_config(peft_config, model, conversions)
    elif targets := getattr(peft_config, "target_parameters", None):
        raise AdapterError(
            f"target_parameters is {sorted(targets)}, but the experts of this model are Linear layers; "
            "name them in target_modules"
        )


def _convert_state_dict(
    model: torch.nn.Module,
    peft_config: PeftConfig,
    adapter_state_dict: dict[str, torch.Tensor],
    adapter_name: str = "default",
) -> dict[str, torch.Tensor]:
    if not has_experts(model):
        return _stock_state_dict(model, peft_config, adapter_state_dict, adapter_name)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = Names(base)
    return {_translate(name, names.in_model): tensor for name, tensor in adapter_state_dict.items()}


def _translate(name: str, translate: Callable[[str], str]) -> str:
    """Translate the part of an adapter's name that is the base's."""
    prefix = _PREFIX if name.startswith(_PREFIX) else ""
    return prefix + translate(name.removeprefix(prefix))
