"""What sizing needs to know of a model: shapes and a few numbers of its config.json."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qpack.checkpoint import Checkpoint
from qpack.errors import CheckpointError

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_ATTENTION = re.compile(r"\.(?:self_)?attn\.|\.(?:self_)?attention\.")
_NORM = re.compile(r"norm|\.ln_", re.IGNORECASE)

Shape = tuple[int, ...]


def in_layer(name: str) -> bool:
    """Whether a weight is in one of the layers."""
    return _LAYER.search(name) is not None


def in_attention(name: str) -> bool:
    """Whether a weight is in the attention of a layer."""
    return _ATTENTION.search(name) is not None


def layer_of(name: str) -> int:
    """The number of the layer that a weight is in, 0 where it is in none."""
    return int(found[1]) if (found := _LAYER.search(name)) else 0


@dataclass(frozen=True, slots=True)
class Model:
    """The shapes of a model, packed or not.

    Raises:
        CheckpointError: from `of`, naming what ``config.json`` lacks.
    """

    packed: Mapping[str, tuple[int, int]]
    """(out_features, in_features) of every packed weight."""
    packed_bytes: int
    """Of the packed weights as stored: codes, scales and states."""
    kept: Mapping[str, Shape]
    """Shape of every other tensor; in memory they have the dtype of the computation."""
    hidden_size: int
    layers: int
    heads: int
    head_dim: int
    cached: int
    """Values that a token leaves in the KV cache in one layer."""
    vocab_size: int
    max_length: int
    experts: int = 1
    """Experts a layer, 1 for a dense model."""
    experts_per_token: int = 1
    latent: bool = False
    """Whether keys and values are computed from a latent vector, which is what the cache holds."""

    @classmethod
    def of(
        cls, config: Mapping[str, Any], packed: Mapping[str, Shape], packed_bytes: int, kept: Mapping[str, Shape]
    ) -> "Model":
        """From ``config.json`` and the shapes of all tensors."""
        text = config.get("text_config", config)

        def number(*names: str) -> int:
            for name in names:
                if isinstance(value := text.get(name), int):
                    return value
            raise CheckpointError(f"config.json: has no {names[0]}, which the sizing needs")

        hidden, heads = number("hidden_size"), number("num_attention_heads")
        head_dim = text.get("head_dim") or hidden // heads
        if "kv_lora_rank" in text:  # one latent vector and one rotated key, for all heads
            cached = number("kv_lora_rank") + number("qk_rope_head_dim")
        else:
            cached = 2 * (text.get("num_key_value_heads") or heads) * head_dim
        experts = {int(found[1]) for name in packed if (found := _EXPERT.search(name))}
        return cls(
            packed={name: (shape[0], shape[1]) for name, shape in packed.items()},
            packed_bytes=packed_bytes,
            kept=kept,
            hidden_size=hidden,
            layers=number("num_hidden_layers"),
            heads=heads,
            head_dim=head_dim,
            cached=cached,
            vocab_size=number("vocab_size"),
            max_length=number("max_position_embeddings"),
            experts=max(experts, default=0) + 1,
            experts_per_token=number("num_experts_per_tok", "moe_topk") if experts else 1,
            latent="kv_lora_rank" in text,
        )

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> "Model":
        """From a checkpoint, packed or not."""
        packed = {name: info.shape for name, info in checkpoint.packed.items()}
        size = sum(info.bytes for info in checkpoint.packed.values())
        kept = {name: shape for name, shape in checkpoint.weights.items() if name not in packed}
        return cls.of(checkpoint.config, packed, size, kept)

    def bytes(self, kept: int = 2) -> int:
        """Of all tensors, with ``kept`` bytes for an element of what is not packed."""
        return self.packed_bytes + kept * sum(map(math.prod, self.kept.values()))

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every linear weight: all matrices in the layers, and what is packed."""
        inside = {name: shape for name, shape in self.kept.items() if len(shape) == 2 and _LAYER.search(name)}
        return {name: (shape[0], shape[1]) for name, shape in inside.items()} | dict(self.packed)

    @property
    def largest(self) -> int:
        """Elements of the largest packed weight: it is dequantized as a whole to be multiplied with."""
        return max((math.prod(shape) for shape in self.packed.values()), default=0)

    def share(self, name: str) -> float:
        """Of the tokens, those that go through the weight ``name``: an expert has its part."""
        return self.experts_per_token / self.experts if _EXPERT.search(name) else 1.0

    @staticmethod
    def by_layer(amounts: Mapping[str, float]) -> dict[int | str, float]:
        """Sums of ``amounts`` by weight over each layer; what is in no layer stands for itself."""
        sums: dict[int | str, float] = {}
        for name, amount in amounts.items():
            layer = int(found[1]) if (found := _LAYER.search(name)) else name
            sums[layer] = sums.get(layer, 0.0) + amount
        return sums

    def in_layer(self, amount: Callable[[int, int], float], *, attention: bool = True) -> int:
        """Sum of ``amount(out_features, in_features)`` over the `linears` that a token goes through in a layer (without
        those of ``attention``), for the layer where it is largest."""
        amounts = {
            name: self.share(name) * amount(*shape)
            for name, shape in self.linears.items()
            if attention or not in_attention(name)
        }
        return math.ceil(max(self.by_layer(amounts).values(), default=0))

    def is_head(self, name: str) -> bool:
        """Whether ``name`` is in no layer and gives logits."""
        return not _LAYER.search(name) and self.linears[name][0] == self.vocab_size

    def input_of(self, name: str) -> tuple[str, bool, int]:
        """What tells the input of the linear weight ``name`` from others: its layer and expert, part, and width."""
        place = _EXPERT.search(name) or _LAYER.search(name)
        within = name[: place.end()] if place else name
        return within, in_attention(name), self.linears[name][1]

    @property
    def normalized(self) -> int:
        """Values that the norms of a layer take in, by token: a norm of one head is applied to all of them."""
        sums: dict[str, int] = {}
        for name, shape in self.kept.items():
            if (layer := _LAYER.search(name)) and len(shape) == 1 and name.endswith(".weight") and _NORM.search(name):
                width = shape[0]
                if width == self.head_dim != self.hidden_size:
                    width = self.heads * self.head_dim if "q_norm" in name else self.cached // 2
                sums[layer[1]] = sums.get(layer[1], 0) + width
        return max(sums.values(), default=2 * self.hidden_size)

    @property
    def inner(self) -> tuple[int, int]:
        """How many values the feed-forward part of a layer computes for a token: before the activation (gate and up),
        and after it, on the way down to ``hidden_size``."""
        before = self.in_layer(lambda rows, columns: rows * (columns == self.hidden_size), attention=False)
        after = self.in_layer(lambda rows, columns: columns * (columns != self.hidden_size), attention=False)
        return before, after
