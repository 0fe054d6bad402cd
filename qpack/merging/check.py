"""Does the merged model say what the base says with its adapters? The divergence of the next token on a sample text.

::

    KL = mean over positions of sum over tokens t of p(t) (log p(t) - log q(t))     in nats

with ``p`` of the base with the adapters beside it, by PEFT, and ``q`` of the merged model. Both compute in f32, on the
weights as they are stored: what differs is the weights, not how they are computed with. In 16 bits computing alone
would differ by more than the weights do.

What is merged onto the base differs by the rounding of its weights. Beside it stands what rounding does to the same
weights of the base, the adapters as they are: no merge into that type can be expected to do less.

One model is in memory at a time, in f32. Packed weights are decoded as `qpack.merge` does: bitsandbytes' decoder errs
on a CPU where rows are no whole blocks.
"""

import logging
import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qpack.checkpoint import Checkpoint
from qpack.errors import DataError, MergeError
from qpack.loading.model import load
from qpack.loading.names import Names
from qpack.loading.weights import read_packed
from qpack.quiet import quiet_libraries

logger = logging.getLogger(__name__)

TOKENS = 512
"""Of a text, its first ones: with a vocabulary of 128,000 their distributions are 262 MB."""
LIMIT = 1e-4
"""The largest divergence of what is merged onto the base; but see `Check.limit`."""
_POSITIONS = 64
"""How many are compared at a time, in f64."""


@dataclass(frozen=True, slots=True)
class Check:
    """What a comparison found."""

    tokens: int
    """Positions that were compared."""
    kl: float
    """Mean divergence, in nats a token."""
    worst: float
    """The largest at one position."""
    rounding: float | None
    """Mean divergence if the same weights of the base are rounded as the result's were, with the adapters beside it.
    None where more than rounding sets the result apart: it is packed, or of an original."""

    @property
    def limit(self) -> float | None:
        """How far the result may be expected to diverge: `LIMIT`, or twice what rounding alone does where that is more,
        as bfloat16's can be; None where nothing is to be expected."""
        return None if self.rounding is None else max(LIMIT, 2 * self.rounding)


class Sample:
    """A text as the tokens of a model.

    Raises:
        DataError: if it is no text, or of fewer than two tokens.
        CheckpointError: if the model has no tokenizer.
    """

    def __init__(self, path: Path, base: Checkpoint) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text, at byte {error.start}") from None
        tokenizer = AutoTokenizer.from_pretrained(base.directory, local_files_only=True)
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=TOKENS)["input_ids"]  # (1, tokens)
        if tokens.shape[1] < 2:
            raise DataError(f"{path}: is {tokens.shape[1]} tokens, expected at least 2")
        self.tokens = tokens

    @torch.inference_mode()
    def log_probs(self, model: Any) -> torch.Tensor:
        """Of every next token: (tokens, vocabulary)."""
        model.eval()
        logits: torch.Tensor = model(self.tokens.to(model.device), use_cache=False).logits[0]
        return logits.float().log_softmax(-1)


def compare(
    sample: Sample,
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    merged: Path,
    rounded: Collection[str],
    dtype: str,
) -> Check:
    """Compare ``base`` with all ``adapters``, each times its weight, with the checkpoint in ``merged``.

    ``rounded`` are the base's weights that were rounded to ``dtype``; none if more sets the result apart.
    """
    logger.info("comparing on %d tokens with %s and its adapters", sample.tokens.shape[1], base)
    with quiet_libraries():
        model = _load(base)
        names = Names(model)
        weights = [weight for name, weight in model.named_parameters() if names.in_checkpoint(name) in rounded]
        adapted = _adapted(model, adapters)
        expected = sample.log_probs(adapted)
        rounding = None
        if rounded:
            for weight in weights:
                weight.data = _rounded(weight.data, getattr(torch, dtype))
            rounding = _divergence(expected, sample.log_probs(adapted)).mean().item()
        del model, weights, adapted
        divergence = _divergence(expected, sample.log_probs(_load(merged)))
    return Check(len(divergence), divergence.mean().item(), divergence.max().item(), rounding)


def require(check: Check, limit: float) -> None:
    """Refuse a divergence over ``limit``.

    Raises:
        MergeError: naming both, and what rounding alone does if that is over the limit too.
    """
    if check.kl <= limit:
        return
    alone = check.rounding is not None and check.rounding > limit
    hint = f"; rounding alone makes {check.rounding:.2g} (--dtype float16 rounds less than bfloat16)" if alone else ""
    raise MergeError(
        f"the merged model diverges from the base with its adapters by KL {check.kl:.2g} a token, "
        f"expected at most {limit:.2g}{hint}"
    )


def _divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """At each position, (tokens,), of log-probabilities (tokens, vocabulary)."""
    pieces = zip(expected.split(_POSITIONS), found.split(_POSITIONS), strict=True)
    divergence = torch.cat([(p.double().exp() * (p.double() - q.double())).sum(-1) for p, q in pieces])
    return divergence.clamp(min=0.0)


def _rounded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As far off as rounding to ``dtype`` puts a weight; scaled, since it may be of that type as it is."""
    return (weight * math.sqrt(2)).to(dtype).float() / math.sqrt(2)


def _load(directory: Path) -> Any:
    """The model in f32, on a GPU where there is one."""
    checkpoint = Checkpoint.open(directory)
    if checkpoint.packed:
        model: Any = load(directory, dtype=torch.float32)
        _unpack(model, checkpoint)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _unpack(model: Any, checkpoint: Checkpoint) -> None:
    """Put decoded weights in the place of packed ones."""
    names = Names(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(read_packed(checkpoint, names.in_checkpoint(f"{name}.weight")))
            plain.bias = layer.bias
            model.set_submodule(name, plain)


def _adapted(model: Any, adapters: Sequence[tuple[Path, float]]) -> Any:
    names = [f"adapter_{index}" for index in range(len(adapters))]
    (first, _), *others = adapters
    with warnings.catch_warnings():
        # Of layers that a packed base holds as Linear ones, which is what they are here.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to True", UserWarning)
        adapted: Any = PeftModel.from_pretrained(model, str(first), names[0])
        for name, (path, _) in zip(names[1:], others, strict=True):
            adapted.load_adapter(str(path), name)
    if others:
        adapted.base_model.set_adapter(names)
    for layer in (module for module in adapted.modules() if isinstance(module, LoraLayer)):
        for name, (_, weight) in zip(names, adapters, strict=True):
            if name in layer.scaling:
                layer.scaling[name] *= weight
    return adapted
