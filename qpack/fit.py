"""Which GPUs a packed model fits, for serving and for training: arithmetic on shapes, before anything is written.

Sizes in bytes, GB of 10**9. A formula stands beside each part with its source; what cannot be derived is an allowance,
and says so. Estimates are for one GPU, and on the safe side where a model keeps less than is assumed (sliding windows
are counted as full attention).

Sources: QLoRA, arXiv 2305.14314; activation checkpointing, arXiv 2205.05198, section 5; multi-head latent attention,
arXiv 2405.04434, section 2.1; bitsandbytes 0.50 (``optim/optimizer.py``, ``autograd/_functions.py``); vLLM 0.32
(``config/cache.py``, ``v1/kv_cache_interface.py``); transformers 5.19 (``loss/loss_utils.py``).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpack.errors import CheckpointError
from qpack.sizes import format_size

CARDS = (12, 16, 24, 32, 48, 80, 96, 141)
"""GB of typical GPUs. Each has a little more than its name says (24 GB: 24,564 MiB = 25.8 * 10**9 bytes)."""

ALLOWANCE = 10**9
"""CUDA context, workspaces of the libraries, CUDA graphs and the allocator's rounding: not derived, 0.5 to 1 GB as seen
with `nvidia-smi` beside torch's own count."""

SERVING_SHARE = 0.92
"""Of a GPU that the engine takes: vLLM's default ``gpu_memory_utilization``."""

STEP_TOKENS = 2048
"""In one forward pass of the engine: vLLM's default ``max_num_batched_tokens``."""

_PAGED_ELEMENTS = 10**5
"""Optimizer state of a smaller parameter is never paged (bitsandbytes, ``get_state_buffer``)."""

_MIN_8BIT_ELEMENTS = 4096
"""A smaller parameter has optimizer state in 32 bits (bitsandbytes, ``min_8bit_size``)."""

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Model:
    """What sizing needs to know of a packed model.

    Raises:
        CheckpointError: from `of`, naming what ``config.json`` lacks.
    """

    packed: Mapping[str, tuple[int, int]]
    """(out_features, in_features) of every packed weight."""
    bytes: int
    """Of all tensors as stored, packed and kept."""
    hidden_size: int
    layers: int
    cached: int
    """Values that a token leaves in the KV cache in one layer."""
    vocab_size: int
    max_length: int
    experts: int = 1
    """Experts a layer, 1 for a dense model."""
    experts_per_token: int = 1

    @classmethod
    def of(cls, config: Mapping[str, Any], packed: Mapping[str, tuple[int, ...]], size: int) -> "Model":
        """From ``config.json``, the shapes of the packed weights, and the ``size`` of all tensors as stored."""
        text = config.get("text_config", config)

        def number(*names: str) -> int:
            for name in names:
                if isinstance(value := text.get(name), int):
                    return value
            raise CheckpointError(f"config.json: has no {names[0]}, which the sizing needs")

        hidden, heads = number("hidden_size"), number("num_attention_heads")
        if "kv_lora_rank" in text:  # one latent vector and one rotated key, for all heads
            cached = number("kv_lora_rank") + number("qk_rope_head_dim")
        else:
            head_dim = text.get("head_dim") or hidden // heads
            cached = 2 * (text.get("num_key_value_heads") or heads) * head_dim
        experts = {int(found[1]) for name in packed if (found := _EXPERT.search(name))}
        return cls(
            packed={name: (shape[0], shape[1]) for name, shape in packed.items()},
            bytes=size,
            hidden_size=hidden,
            layers=number("num_hidden_layers"),
            cached=cached,
            vocab_size=number("vocab_size"),
            max_length=number("max_position_embeddings"),
            experts=max(experts, default=0) + 1,
            experts_per_token=number("num_experts_per_tok", "moe_topk") if experts else 1,
        )

    @property
    def largest(self) -> int:
        """Elements of the largest packed weight: it is dequantized as a whole to be multiplied with."""
        return max((math.prod(shape) for shape in self.packed.values()), default=0)

    def in_layer(self, features: Callable[[int, int], int]) -> int:
        """Sum of ``features(out_features, in_features)`` over the packed weights that a token goes through in a layer,
        for the layer where it is largest."""
        sums: dict[str, float] = {}
        for name, shape in self.packed.items():
            layer = found[1] if (found := _LAYER.search(name)) else name
            share = self.experts_per_token / self.experts if _EXPERT.search(name) else 1.0
            sums[layer] = sums.get(layer, 0.0) + share * features(*shape)
        return math.ceil(max(sums.values(), default=0))


@dataclass(frozen=True, slots=True)
class Need:
    """GPU memory for one purpose. As a string: one line."""

    purpose: str
    """What for, with length and batch."""
    parts: Mapping[str, int]
    """Bytes by what they hold."""
    pageable: int = 0
    """How many of them may move to the CPU while memory is short (QLoRA's paged optimizer)."""
    share: float = 1.0
    """Of a GPU that may be used."""

    @property
    def bytes(self) -> int:
        """In all."""
        return sum(self.parts.values())

    def fits(self, gigabytes: float) -> bool:
        """Whether it fits a GPU of so many GB, with everything pageable paged out."""
        return self.bytes - self.pageable <= self.share * gigabytes * 10**9

    def smallest(self, cards: Sequence[int] = CARDS) -> int | None:
        """The smallest of ``cards`` (GB) that it fits."""
        return min(filter(self.fits, cards), default=None)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {format_size(size)}" for name, size in self.parts.items())
        card = self.smallest()
        where = f"fits a GPU of {card} GB" if card else f"fits no GPU of up to {CARDS[-1]} GB"
        paged = " with its optimizer paged" if card and self.bytes > self.share * card * 10**9 else ""
        return f"{self.purpose}: {format_size(self.bytes)} ({parts}); {where}{paged}"


def serving(model: Model, *, length: int | None = None, batch: int = 1) -> Need:
    """To serve ``batch`` sequences of ``length`` tokens (the model's longest by default, 8192 at most) with vLLM.

    - KV cache: ``cached * layers`` values of 2 bytes a token (``AttentionSpec``: 2 * kv_heads * head_dim a layer).
    - engine: the largest weight dequantized to 16 bits (`MatMul4Bit` for more than one row), one step's tokens through
      one layer in 16 bits, the logits of one token a sequence in f32, and the allowance.
    """
    length = min(model.max_length, 8192) if length is None else length
    step = min(STEP_TOKENS, length * batch)
    activations = 2 * step * (2 * model.hidden_size + model.in_layer(lambda rows, columns: rows + columns))
    parts = {
        "weights": model.bytes,
        "KV cache": 2 * model.cached * model.layers * length * batch,
        "engine": ALLOWANCE + 2 * model.largest + activations + 4 * batch * model.vocab_size,
    }
    return Need(f"serve {_batch(batch, length)}", parts, share=SERVING_SHARE)


def training(model: Model, *, length: int = 512, batch: int = 1, r: int = 16) -> Need:
    """To train LoRA of rank ``r`` on every packed weight, on ``batch`` sequences of ``length`` tokens at a time.

    With n = r * (out_features + in_features) a weight:

    - LoRA 4n and gradients 4n bytes: both in f32.
    - optimizer: two moments in 8 bits with one f32 scale per 256, 2n * (1 + 4/256); 8n where A or B has fewer than 4096
      elements. What has 10**5 elements or more can be paged.
    - activations, with checkpointing: each layer's input in 16 bits, 2 * hidden_size * layers a token; and all of one
      layer while it is computed again: for every weight the input in 16 bits and in f32 (which A is multiplied with),
      the output in 16 bits, and r values in f32: 6 in + 2 out + 4r bytes a token. Attention scores are not kept (SDPA).
    - logits, by token and vocabulary: 2 bytes, their f32 copy, its log-softmax and the gradient: 14 bytes.
    - workspace: the largest weight dequantized to 16 bits, and the allowance.
    """
    tokens = length * batch
    sides = [r * side for shape in model.packed.values() for side in shape]  # elements of B and of A
    states = {elements: _optimizer_bytes(elements) for elements in set(sides)}
    layer = model.in_layer(lambda rows, columns: 6 * columns + 2 * rows + 4 * r)
    parts = {
        "weights": model.bytes,
        "LoRA": 4 * sum(sides),
        "gradients": 4 * sum(sides),
        "optimizer": sum(states[elements] for elements in sides),
        "activations": tokens * (2 * model.hidden_size * model.layers + layer),
        "logits": 14 * tokens * model.vocab_size,
        "workspace": ALLOWANCE + 2 * model.largest,
    }
    pageable = sum(states[elements] for elements in sides if elements >= _PAGED_ELEMENTS)
    return Need(f"train r={r} on {_batch(batch, length)}", parts, pageable)


def _optimizer_bytes(elements: int) -> int:
    if elements < _MIN_8BIT_ELEMENTS:
        return 8 * elements
    return 2 * (elements + 4 * math.ceil(elements / 256))


def _batch(batch: int, length: int) -> str:
    return f"{batch} x {length} tokens"
