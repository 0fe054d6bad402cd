"""Does the merged model say what the base says with its adapters? The divergence of the next token on a sample text.

::

    KL = mean over positions of sum over tokens t of p(t) (log p(t) - log q(t))     in nats

with ``p`` of the base with the adapters beside it, by PEFT, and ``q`` of the merged model. Both compute in f32, on the
weights as they are stored: what differs is the weights, not how they are computed with. In 16 bits computing alone
would differ by more than the weights do.

One model is in memory at a time, in f32, except for packed weights.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

from qpack.checkpoint import Checkpoint
from qpack.errors import DataError, MergeError
from qpack.loading.model import load
from qpack.quiet import quiet_libraries

logger = logging.getLogger(__name__)

TOKENS = 512
"""Of a text, its first ones: with a vocabulary of 128,000 their distributions are 262 MB."""
LIMIT = 1e-4
"""The largest divergence of what is merged onto the packed base: only the rounding of its weights."""
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


def compare(sample: Sample, base: Path, adapters: Sequence[tuple[Path, float]], merged: Path) -> Check:
    """Compare ``base`` with all ``adapters``, each times its weight, with the checkpoint in ``merged``."""
    logger.info("comparing on %d tokens with %s and its adapters", sample.tokens.shape[1], base)
    with quiet_libraries():
        expected = sample.log_probs(_adapted(_load(base), adapters))
        found = sample.log_probs(_load(merged))
    divergence = torch.cat(
        [
            (p.double().exp() * (p.double() - q.double())).sum(-1)
            for p, q in zip(expected.split(_POSITIONS), found.split(_POSITIONS), strict=True)
        ]
    )
    return Check(len(divergence), max(divergence.mean().item(), 0.0), max(divergence.max().item(), 0.0))


def require(check: Check, limit: float, dtype: str | None) -> None:
    """Refuse a divergence over ``limit``. ``dtype`` is what weights were rounded to, if nothing else was done to them.

    Raises:
        MergeError: naming both.
    """
    if check.kl <= limit:
        return
    hint = "; rounding to bfloat16 alone can do that (--dtype float16 rounds less)" if dtype == "bfloat16" else ""
    raise MergeError(
        f"the merged model diverges from the base with its adapters by KL {check.kl:.2g} a token, "
        f"expected at most {limit:g}{hint}"
    )


def _load(directory: Path) -> Any:
    if Checkpoint.open(directory).packed:
        return load(directory, dtype=torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _adapted(model: Any, adapters: Sequence[tuple[Path, float]]) -> Any:
    names = [f"adapter_{index}" for index in range(len(adapters))]
    (first, _), *others = adapters
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
