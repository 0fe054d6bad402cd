"""A packed base spread over several processes: each reads and holds one part of every weight (FSDP2).

torch's ``fully_shard`` splits what a decoder layer holds, packed bytes included, along their first dimension, and
gathers a layer just before it computes, forward and backward. Of N processes each so holds 1/N of the weights, and one
whole layer while that computes. The model is split while it is on the meta device, so that transformers' loader reads
of every tensor the slice of this process and nothing else.

The scales of the packed weights are 1/32 of their bytes, and whole in every process: a slice of a weight does not end
where a block of 64 ends. The loader puts them into buffers beside the weight, and here they become the quant state.

LoRA is added to the split model and is in no part of it: small, and whole in every process.

accelerate 1.15 does not do this: its FSDP2 leaves ``Params4bit`` whole with no more than a warning.

Refused: a model without decoder layers that transformers can recompute; these are what is gathered.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming, WeightTransform
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.quantizers.auto import register_quantization_config, register_quantizer

from qpack._core import SUFFIXES, read_header
from qpack.errors import CheckpointError
from qpack.loading.names import Names
from qpack.loading.quantizer import PackedConfig, PackedQuantizer

METHOD = "qpack_sharded"
"""The ``quant_method`` that leads transformers here."""

_BUFFERS = {suffix: "scales_" + suffix.split(".")[1] for suffix in SUFFIXES}
"""".absmax": "scales_absmax", and so on: the bare names are attributes of bitsandbytes' own."""


@register_quantization_config(METHOD)
class ShardedConfig(PackedConfig):
    """`PackedConfig` for a model that is spread over all processes."""

    method = METHOD


@register_quantizer(METHOD)
class ShardedQuantizer(PackedQuantizer):
    """`PackedQuantizer` that splits the model before its weights are loaded."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                _shape_as_stored(module)
        for name, suffix in _scales(model, kwargs["checkpoint_files"]):
            model.get_submodule(name).register_buffer(_BUFFERS[suffix], torch.empty(0, device="meta"))
        _split(model, torch.device(kwargs["device_map"][""]).type)

    def get_weight_conversions(self) -> list[WeightTransform]:
        """Scales go to their buffers; stock code would put a weight and its scales together on the way."""
        return [WeightRenaming(rf"weight\{suffix}$", buffer) for suffix, buffer in _BUFFERS.items()]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, Linear4bit):
                _attach_scales(module)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def _cast(self, model: PreTrainedModel, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        cast = nn.Parameter(tensor.to(dtype), requires_grad=False)  # a split tensor takes no other data
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter is tensor:
                    setattr(module, name, cast)


def _split(model: PreTrainedModel, device_type: str) -> None:
    """Split ``model``, which is on the meta device, layer by layer."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise CheckpointError(f"{type(model).__name__}: has no decoder layers that could be gathered one by one")
    model.requires_grad_(False)  # must be known now: bytes have no gradient
    mesh = init_device_mesh(device_type, (get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    # What no layer holds (embeddings, the last norm, the head) is gathered for the whole of a pass.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def _shape_as_stored(layer: Linear4bit) -> None:
    """Give the weight the shape that it has in a file: (elements, 1), two values in a byte."""
    storage = cast(torch.dtype, layer.quant_storage)
    elements = layer.out_features * layer.in_features // (2 * storage.itemsize)
    layer.weight = nn.Parameter(torch.empty(elements, 1, dtype=storage, device="meta"), requires_grad=False)


def _scales(model: PreTrainedModel, files: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield layer and suffix of all scales in the files: not every checkpoint has nested ones."""
    names = Names(model)
    for file in files:
        for info in read_header(Path(file)):
            for suffix in SUFFIXES:
                if info.name.endswith(".weight" + suffix):
                    yield names.in_model(info.name.removesuffix(suffix)).removesuffix(".weight"), suffix


def _attach_scales(layer: Linear4bit) -> None:
    """Let the layer compute and take LoRA: bitsandbytes reads the scales from the layer, PEFT their kind."""
    buffers = {suffix.removeprefix("."): layer._buffers.pop(buffer, None) for suffix, buffer in _BUFFERS.items()}
    scales = {name: scale for name, scale in buffers.items() if scale is not None}
    state: Any = QuantState.from_dict(scales, device=scales["absmax"].device)
    weight = cast(Any, layer.weight)
    weight.quant_state, weight.quant_type, weight.compress_statistics = state, state.quant_type, state.nested
    cast(Any, layer).quant_state = state
