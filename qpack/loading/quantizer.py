"""How transformers is told to load what qpack packs: a quantizer of its own kind, by its own register.

It is transformers' bitsandbytes quantizer with two steps before it. On the meta device, fused experts and Linear layers
of a class of the model's own (Falcon) become ``nn.Linear``, which bitsandbytes' own step then turns into
``Linear4bit``; and the conversions that would merge the experts of the checkpoint into a 3-D parameter are dropped. All
weights are read by stock code, and never exist in 16 bits. A model that has neither is loaded as stock loads it.
Reference: transformers 5.19, ``quantizers/base.py`` (which does the same for Llama 4) and ``quantizer_bnb_4bit.py``.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightTransform, build_glob_alternation
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qpack._core import read_header
from qpack.errors import CheckpointError
from qpack.loading.experts import Projections, unfuse_experts
from qpack.loading.names import Names
from qpack.policy.roles import PLAIN_SUBCLASSES
from qpack.policy.skipping import EXPERT

METHOD = "qpack"
"""The ``quant_method`` that leads transformers here. It stands in a config only while a model is being loaded."""


@register_quantization_config(METHOD)
class PackedConfig(BitsAndBytesConfig):
    """`BitsAndBytesConfig` under the name :data:`METHOD`."""

    method = METHOD

    def __init__(self, **settings: Any) -> None:
        """Take what `BitsAndBytesConfig` takes."""
        super().__init__(load_in_4bit=True, **settings)  # type: ignore[no-untyped-call]
        self.quant_method: Any = self.method

    @classmethod
    def declared_by(cls, quantization_config: dict[str, Any]) -> dict[str, Any]:
        """The ``quantization_config`` of a packed checkpoint, renamed so that this class reads it."""
        settings = {key: value for key, value in quantization_config.items() if not key.startswith("load_in_")}
        return settings | {"quant_method": cls.method}


@register_quantizer(METHOD)
class PackedQuantizer(Bnb4BitHfQuantizer):
    """`Bnb4BitHfQuantizer` for all that qpack packs. The model that it loads declares plain bitsandbytes."""

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        """Go on under bitsandbytes' own config, which is what PEFT and accelerate look for."""
        settings = quantization_config.to_dict()
        del settings["quant_method"]
        super().__init__(BitsAndBytesConfig(**settings), **kwargs)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedQuantizer":
        """Stay one: transformers copies a conversion, and with it its quantizer, for each of the tensors it loads."""
        return self

    def _process_model_before_weight_loading(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        if not unfold(model) and _holds_experts(kwargs["checkpoint_files"]):
            kind = type(model).__name__
            raise CheckpointError(f"{kind}: holds no experts in the form that can be loaded packed")
        # The checkpoint names what it keeps in its own words, and stock looks for those in the model.
        skipped = self.quantization_config.llm_int8_skip_modules or []
        self.quantization_config.llm_int8_skip_modules = [*map(Names(model).in_model, skipped)]
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        self.quantization_config.llm_int8_skip_modules = skipped
        self._dtypes = {name: tensor.dtype for name, tensor in _floats(model)}
        for module in model.modules():
            if isinstance(module, Linear4bit):
                # So that a missing one is reported: transformers would try to draw its bytes at random.
                cast(Any, module)._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Cast what stock leaves in the dtype of the file: every tensor that it renamed, as the router of Mixtral."""
        in_float32 = list(model._get_dtype_plan(model.dtype))
        kept, _, _ = build_glob_alternation(in_float32)
        for name, tensor in _floats(model):
            dtype = torch.float32 if in_float32 and kept.search(name) else self._dtypes[name]
            if tensor.dtype != dtype:
                self._cast(model, tensor, dtype)
        super()._process_model_after_weight_loading(model, **kwargs)
        return model

    def _cast(self, model: PreTrainedModel, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        tensor.data = tensor.data.to(dtype)

    def update_weight_conversions(self, weight_conversions: list[WeightTransform]) -> list[WeightTransform]:
        """Leave the experts of the checkpoint apart."""
        kept = [conversion for conversion in weight_conversions if not _merges_experts(conversion)]
        conversions: list[WeightTransform] = super().update_weight_conversions(kept)  # type: ignore[no-untyped-call]
        return conversions


def unfold(model: PreTrainedModel) -> int:
    """Make every weight that may be packed a Linear layer of its own, on the meta device.

    Returns how many modules of fused experts there were.
    """
    experts = unfuse_experts(model, _projections(model))
    _make_linears_plain(model)
    return experts


def _holds_experts(files: Iterable[str]) -> bool:
    """Whether a checkpoint stores experts one by one."""
    return any(EXPERT.match(info.name) for file in files for info in read_header(Path(file)))


def _make_linears_plain(model: PreTrainedModel) -> None:
    """Replace every Linear that is one by another name, on the meta device; stock takes the class itself only."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and type(module).__name__ in PLAIN_SUBCLASSES:
            size, bias = (module.in_features, module.out_features), module.bias is not None
            model.set_submodule(name, nn.Linear(*size, bias, device="meta", dtype=module.weight.dtype))


def _floats(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """All parameters and buffers but the 4-bit ones."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]


def _merges_experts(conversion: WeightTransform) -> bool:
    return isinstance(conversion, WeightConverter) and any(
        isinstance(operation, MergeModulelist) for operation in conversion.operations
    )


def _projections(model: PreTrainedModel) -> Projections:
    """What checkpoints of this family call an expert's layers, from the conversions that would have merged them.

    A family without such a conversion has fused experts on the hub (gpt-oss); packed ones have the usual names.
    """
    names: dict[int, tuple[str, ...]] = {}
    for conversion in get_model_conversion_mapping(model):
        if _merges_experts(conversion):
            # "mlp.experts.*.gate_proj.weight" -> "gate_proj"
            layers = tuple(pattern.split(".")[-2] for pattern in conversion.source_patterns)
            names[len(layers)] = layers
    if names.keys() == {1, 2}:
        return Projections(*names[2], *names[1])
    return Projections()
