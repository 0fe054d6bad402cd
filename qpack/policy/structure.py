"""The structure of any model that transformers builds: its modules on the meta device, and where tensors land in them.

Nothing is loaded and no code from the checkpoint runs: config.json says which class of transformers it is, that is
built without memory for weights, and transformers' own conversion mapping tells which parameter a stored name becomes.

Packed are, as in transformers' own 4-bit loading, the weights of ``nn.Linear`` and ``Conv1D``, and beyond it those of
routed experts and of Falcon's own Linear, which transformers leaves in 16 bits. Kept are the output embedding and what
is tied, routers, all outside the text tower of a multimodal model, and what transformers stores in another layout.

Reference: transformers 5.19, ``core_model_loading.py``, ``conversion_mapping.py``, ``integrations/bitsandbytes.py``.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpack.errors import CheckpointError
from qpack.policy.roles import (
    OUTPUT,
    PLAIN_SUBCLASSES,
    PROJECTOR,
    ROUTER,
    Anatomy,
    Experts,
    Kept,
    Linear,
    Role,
    router_block,
)
from qpack.policy.skipping import skips
from qpack.quiet import quiet_libraries

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Modules of another tower, by a part of their path.
_TOWERS = {
    "vision tower": re.compile(r"(^|[._])(vision|visual|image|img|vit)"),
    "audio tower": re.compile(r"(^|[._])(audio|speech|sound)"),
}

# Experts that are stored in one tensor everywhere, and the names of their parts, which `qpack.load` reads.
_FUSED_EVERYWHERE = {"GptOssExperts": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}}


def read_anatomy(config_path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Anatomy:
    """Tell what each tensor of ``shapes`` is to the model of ``config``, which was read from ``config_path``.

    ``shapes`` has no tensors that only decode others, and the shapes as decoded.

    Raises:
        CheckpointError: if transformers is missing or builds no such model, or if a weight of it has no tensor.
    """
    model = _build(config_path, config)
    landing = _Landing(model)
    outside = _Outside(model)
    linears = dict(_linears(model, outside))
    blocks = _expert_blocks(model)
    modules = dict(model.named_modules())
    roles: dict[str, Role] = {}
    lacking = {key for key, linear in linears.items() if not linear.keep}
    unstored = {linear.module for linear in linears.values()}
    for name, shape in sorted(shapes.items()):
        (key, *more), converted = landing.find(name)
        lacking.difference_update((key, *more))
        path, _, leaf = key.rpartition(".")
        if linear := linears.get(key):
            if converted and not linear.keep:
                linear = Linear(linear.module, keep="transformers stores it in another layout")
            roles[name] = linear
            unstored.discard(linear.module)
        elif reason := outside.reason(path):
            roles[name] = Kept(path, reason)
        elif _has_experts(modules.get(path)):
            roles[name] = _experts(landing, name, shape, path, modules[path], leaf)
        elif leaf == "weight" and len(shape) == 2 and router_block(path) in blocks:
            roles[name] = Kept(path, ROUTER)
    if lacking:
        raise CheckpointError(f"{config_path}: no tensor for {min(lacking)} of {type(model).__name__}")
    output = next((linear.module for linear in linears.values() if linear.keep == OUTPUT), "")
    fused = any(isinstance(role, Experts) and role.outputs for role in roles.values())
    return Anatomy(
        roles={name: roles[name] for name in shapes if name in roles},
        output=output,
        tied=f"{output}.weight" in model.all_tied_weights_keys,
        unstored=frozenset(unstored),
        names=landing.hub_names(shapes) if fused else {},
    )


def _build(path: Path, config: Mapping[str, Any]) -> "PreTrainedModel":
    """The model of ``config``, without weights."""
    kind = str(config.get("model_type"))
    try:
        import torch
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_CAUSAL_LM_MAPPING,
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        )
    except ImportError as error:
        raise CheckpointError(f"{path}: only transformers knows what is in a {kind!r} model ({error})") from None
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(f"{path}: model_type is {kind!r}, which transformers does not know")
    content = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        with quiet_libraries(), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            parsed = CONFIG_MAPPING[kind].from_dict(content)
            classes: list[Any] = []
            for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
                found = mapping.get(type(parsed), ())
                classes += found if isinstance(found, tuple) else [found]
            named = [found for found in classes if found.__name__ in (config.get("architectures") or ())]
            model = _instance((named or classes)[0], parsed) if classes else None
    except Exception as error:  # 200 families fail on wrong values in as many ways
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: transformers cannot build the model: {reason}") from None
    if model is None:
        raise CheckpointError(f"{path}: model_type is {kind!r}, of which transformers builds no language model")
    return model


def _instance(kind: Any, config: Any) -> "PreTrainedModel":
    """A model of the class ``kind``, which may be that of the text tower alone."""
    text_only = kind.config_class is type(config).sub_configs.get("text_config")
    model: PreTrainedModel = kind._from_config(config.get_text_config() if text_only else config)
    return model


class _Landing:
    """Where stored tensors land in a model: transformers' renaming, and back to the names on the hub."""

    def __init__(self, model: "PreTrainedModel") -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        reverse = [transform.reverse_transform() for transform in reversed(mapping)]
        self._model = model
        self._state = model.state_dict()
        self._forward = (
            [entry for entry in mapping if isinstance(entry, WeightRenaming)],
            [entry for entry in mapping if isinstance(entry, WeightConverter)],
        )
        self._back = (
            [entry for entry in reverse if isinstance(entry, WeightRenaming)],
            [entry for entry in reverse if isinstance(entry, WeightConverter)],
        )

    def find(self, name: str) -> tuple[tuple[str, ...], bool]:
        """The parameters that ``name`` becomes, and whether by a change of layout."""
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        key, pattern = rename_source_key(name, *self._forward, prefix, self._state)
        if key not in self._state and name in self._state:
            return (name,), False
        if pattern is None:
            return (key,), False
        converter = next(entry for entry in self._forward[1] if pattern in entry.source_patterns)
        first, *_ = converter.target_patterns
        return tuple(key.replace(first, target) for target in converter.target_patterns), True

    def per_expert(self, key: str) -> tuple[str, ...]:
        """The names on the hub, with ``*`` for the number, of the weights that make up the fused parameter ``key``."""
        from transformers.core_model_loading import SplitModulelist, rename_source_key

        name, pattern = rename_source_key(key, *self._back, reverse=True)
        if pattern is None or name.count("*") != 1:
            return ()
        converter = next(entry for entry in self._back[1] if pattern in entry.source_patterns)
        if not any(isinstance(operation, SplitModulelist) for operation in converter.operations):
            return ()
        first = converter.target_patterns[0].lstrip(".")
        return tuple(name.replace(first, target.lstrip(".")) for target in converter.target_patterns)

    def hub_names(self, names: Iterable[str]) -> dict[str, str]:
        """The names on the hub of what is stored under names that only transformers knows."""
        from transformers.core_model_loading import rename_source_key

        found = {}
        for name in names:
            (key, *_), converted = self.find(name)
            hub, _ = rename_source_key(key, *self._back, reverse=True)
            if hub != name and not converted and "*" not in hub and self.find(hub) == ((key,), False):
                found[name] = hub
        return found


class _Outside:
    """What of a model is outside its text tower."""

    def __init__(self, model: "PreTrainedModel") -> None:
        from transformers import PreTrainedModel

        text = model.config.get_text_config(decoder=True)
        self._composite = type(text) is not type(model.config)
        self._text = tuple(
            f"{name}."
            for name, module in model.named_modules()
            if isinstance(module, PreTrainedModel) and type(module.config) is type(text)
        )

    def reason(self, module: str) -> str:
        """What ``module`` is a part of, if not of the text tower; empty if of that."""
        if self._composite and f"{module}.".startswith(self._text):
            return ""
        for reason, pattern in _TOWERS.items():
            if pattern.search(module):
                return reason
        return PROJECTOR if self._composite else ""


def _linears(model: "PreTrainedModel", outside: _Outside) -> Iterator[tuple[str, Linear]]:
    """The Linear modules, by the names of their weights in the model."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    tied = {source: key for key, source in model.all_tied_weights_keys.items()} | dict(model.all_tied_weights_keys)
    output = model.get_output_embeddings()
    entry = next((name for name, module in model.named_modules() if module is output), None)
    blocks = _expert_blocks(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        kind = "" if type(module) in (nn.Linear, Conv1D) else type(module).__name__
        keep = ""
        if module is output:
            keep = OUTPUT
        elif reason := outside.reason(name):
            keep = reason
        elif entry is not None and skips(entry, name):
            keep = f"transformers skips it with {entry}"
        elif f"{name}.weight" in tied:
            keep = f"tied to {tied[f'{name}.weight']}"
        elif router_block(name) in blocks:
            keep = ROUTER
        elif not should_convert_module(name, list(model._keep_in_fp32_modules or ())):
            keep = "kept in float32 by transformers"
        elif kind and kind not in PLAIN_SUBCLASSES:
            keep = f"a {kind}"
        yield f"{name}.weight", Linear(name, isinstance(module, Conv1D), keep, kind)


def _has_experts(module: "nn.Module | None") -> bool:
    return module is not None and "Experts" in type(module).__name__


def _expert_blocks(model: "PreTrainedModel") -> frozenset[str]:
    """The names, each with a dot behind it, of every block that has experts somewhere in it."""
    paths = [name for name, module in model.named_modules() if _has_experts(module) or name.endswith(".experts")]
    return frozenset(path[: match.end()] for path in paths for match in re.finditer(r"\.", path))


def _experts(
    landing: _Landing, name: str, shape: tuple[int, ...], path: str, module: "nn.Module", leaf: str
) -> Experts | Kept:
    """The role of the tensor ``name``, which lands in the parameter ``leaf`` of the experts at ``path``."""
    kind = type(module).__name__
    unread = Kept(path, f"routed experts as {kind}, which nothing loads in 4 bits")
    if not getattr(module, "has_gate", False):
        return unread
    if leaves := _FUSED_EVERYWHERE.get(kind):
        weight = leaf.removesuffix("_bias")
        suffix = "weight" if weight == leaf else "bias"
        outputs = tuple(f"{path}.*.{part}.{suffix}" for part in leaves[weight])
        interleaved = len(outputs) > 1 and not module.is_concatenated
        return Experts(path, outputs, suffix == "weight", interleaved, "" if suffix == "weight" else "bias")
    outputs = landing.per_expert(f"{path}.{leaf}")
    if outputs and len(shape) == 2:
        return Experts(path)
    if outputs and not module.is_transposed and shape == tuple(module.get_parameter(leaf).shape):
        return Experts(path, outputs)
    return unread
