"""One call from a directory, packed or plain, to a transformers model that computes, takes LoRA and trains."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qpack.errors import CheckpointError
from qpack.loading.base import require_packed
from qpack.loading.experts import has_experts
from qpack.loading.in_place import keep_weights_in_place
from qpack.loading.quantizer import PackedConfig, unfold

_NAMES_SHOWN = 3
"""How many tensors an error names: a model with experts has ten thousands."""


def load(
    directory: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    sharded: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load the packed checkpoint in ``directory`` as transformers' ``AutoModelForCausalLM`` does, experts included.

    The 4-bit weights stay as they are stored, and every one of them is a ``bitsandbytes.nn.Linear4bit``: those of an
    expert are ``...experts.E.gate_proj`` and so on (``w1``, ``w2``, ``w3`` for Mixtral). PEFT's ``target_modules``
    finds them, ``"all-linear"`` included, and so does ``prepare_model_for_kbit_training``.

    A CPU with AVX512-BF16 keeps the layout that training needs, not the one that bitsandbytes computes fastest on.

    Args:
        directory: what `qpack.convert` wrote.
        dtype: of the computation and of the weights that are not packed; by default what config.json asks for.
        device_map: as in ``from_pretrained``; by default the first GPU, or the CPU.
        sharded: spread the weights over all processes of torch's default group, each of which makes this call and
            reads only its part, as :mod:`qpack.loading.sharded` describes.
        kwargs: what else ``from_pretrained`` takes, such as ``attn_implementation``.

    Raises:
        CheckpointError: the directory is not a packed checkpoint, cannot be read, lacks or has more tensors than the
            model, or holds experts of a kind that cannot be loaded packed.
        TrainingError: this bitsandbytes cannot be kept from changing the weights on a CPU.
    """
    directory = Path(directory)
    require_packed(directory)

    def declare(config: Any) -> None:
        declared = config.quantization_config
        if dtype is not None:
            declared["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
        config.quantization_config = _config_class(sharded=sharded).declared_by(declared)

    model = _from_pretrained(directory, declare, dtype=dtype, device_map=device_map, **kwargs)
    keep_weights_in_place(model)
    if has_experts(model):
        from qpack.loading.adapters import teach_peft

        teach_peft()
    return model


def load_plain(directory: Path, *, dtype: torch.dtype, device_map: Any) -> PreTrainedModel:
    """Load a checkpoint that is not quantized as transformers does; all of its weights become ``dtype``.

    Raises:
        CheckpointError: it cannot be read, or lacks or has more tensors than the model.
    """
    return _from_pretrained(directory, lambda config: None, dtype=dtype, device_map=device_map)


def outline(directory: Path, *, plain: bool) -> PreTrainedModel:
    """The modules that `load`, or `load_plain`, would give, under their names and without weights, in no time.

    What will be packed is a ``Linear`` here.

    Raises:
        CheckpointError: config.json is of no model that transformers knows.
    """
    with _naming(directory), torch.device("meta"):
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        config.__dict__.pop("quantization_config", None)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        if not plain:
            unfold(model)
    return model


def _from_pretrained(
    directory: Path, configure: Callable[[Any], None], *, dtype: torch.dtype | None, device_map: Any, **kwargs: Any
) -> PreTrainedModel:
    """What transformers makes of the directory, which must be all of the model, its config changed by ``configure``."""
    if dtype is not None:
        kwargs["dtype"] = dtype
    with _naming(directory):
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        configure(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            device_map=device_map,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **kwargs,
        )
    model: PreTrainedModel
    model, loading = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, loading[kind])):
            rest = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            shown = ", ".join(names[:_NAMES_SHOWN])
            raise CheckpointError(f"{directory}: {kind.replace('_', ' ')}: {shown}{rest}")
    return model


@contextmanager
def _naming(directory: Path) -> Iterator[None]:
    """Let what fails name ``directory``."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: cannot be loaded: {' '.join(str(error).split())}") from error


def _config_class(*, sharded: bool) -> type[PackedConfig]:
    if not sharded:
        return PackedConfig
    from qpack.loading.sharded import ShardedConfig  # a second of imports that one process has no use for

    return ShardedConfig
