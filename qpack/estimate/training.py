"""Memory to train LoRA on a model, part by part, at the moment of a step when it is largest.

With n = r * (out_features + in_features) for a weight, and c the bytes of a value in the dtype of the computation:

- weights: packed ones as stored, all others in c.
- adapters and gradients: 4n each, both in f32.
- optimizer: two moments; in 32 bits 8n, in 8 bits with one f32 scale per 256 2n * (1 + 4/256), but 8n where A or B has
  fewer than 4096 elements. Of a paged optimizer, what has 10**5 elements or more can be paged.
- activations: what autograd keeps of a layer for each token, see `saved_in_layer`, for all layers; with checkpointing
  c * hidden_size for each layer, and in the backward all of one layer, which is computed again.
- logits: by token and vocabulary 8 bytes, and c more in 16 bits: the logits, themselves in f32, and their log-softmax;
  of `LOGITS_AT_A_TIME` of them at most (`qpack.training.log_probs`). They are gone when the layers' backward begins:
  the peak is at the loss, with logits, or in the first layer's backward, with the gradients of what is inside it.
- workspace: the largest weight dequantized, and an allowance for what is not the model's.

Sources: QLoRA, arXiv 2305.14314; activation checkpointing, arXiv 2205.05198, section 5; transformers 5.19
(``models/llama``, ``integrations/sdpa_attention.py``); PEFT 0.21 (``tuners/lora/bnb.py``);
bitsandbytes 0.50 (``optim/optimizer.py``, ``autograd/_functions.py``: a frozen weight keeps nothing of its input).
"""

import math
from dataclasses import dataclass

from qpack.estimate.device import Device
from qpack.estimate.model import Model
from qpack.estimate.need import Need
from qpack.training.settings import LOGITS_AT_A_TIME, TrainSettings, checkpointing

_PAGED_ELEMENTS = 10**5
"""Optimizer state of a smaller parameter is never paged (bitsandbytes, ``get_state_buffer``)."""

_MIN_8BIT_ELEMENTS = 4096
"""A smaller parameter has optimizer state in 32 bits (bitsandbytes, ``min_8bit_size``)."""


@dataclass(frozen=True, slots=True)
class Run:
    """What of a run decides on its memory."""

    batch: int = 1
    """Sequences in a forward pass."""
    length: int = 512
    """Tokens of the longest."""
    r: int = 16
    dropout: bool = True
    optimizer_bits: int = 8
    paged: bool = True
    checkpointing: bool = True

    @classmethod
    def of(cls, settings: TrainSettings, device: Device) -> "Run":
        """What these settings come to on ``device``."""
        on_gpu = device.kind == "cuda"
        return cls(
            batch=settings.batch_size,
            length=settings.max_length,
            r=settings.r,
            dropout=settings.lora_dropout > 0,
            optimizer_bits=8 if settings.optim.endswith("8bit") else 32,
            paged=settings.optim.startswith("paged") and on_gpu,
            checkpointing=checkpointing(settings, device.kind),
        )


_ONE_SEQUENCE = Run()
_GPU = Device.gpu(24 * 10**9)


def training(model: Model, run: Run = _ONE_SEQUENCE, device: Device = _GPU) -> Need:
    """To train LoRA of rank ``run.r`` on every matrix in the layers."""
    c, tokens = device.value_bytes, run.batch * run.length
    sides = [run.r * side for shape in model.linears.values() for side in shape]  # elements of B and of A
    states = {elements: _optimizer_bytes(elements, run.optimizer_bits) for elements in set(sides)}
    layer = saved_in_layer(model, run, device)
    logits = (8 + (c if c == 2 else 0)) * min(tokens * model.vocab_size, LOGITS_AT_A_TIME)
    inputs = c * model.hidden_size * model.layers
    forward = inputs if run.checkpointing else layer * model.layers
    backward = (inputs + layer if run.checkpointing else forward) + _gradients(model, run, device)
    at_loss = tokens * forward + logits >= tokens * backward
    parts = {
        "weights": model.bytes(kept=c),
        "adapters": 4 * sum(sides),
        "gradients": 4 * sum(sides),
        "optimizer": sum(states[elements] for elements in sides),
        "activations": tokens * (forward if at_loss else backward),
        "logits": logits if at_loss else 0,
        "workspace": c * model.largest + device.allowance,
    }
    pageable = sum(states[elements] for elements in sides if elements >= _PAGED_ELEMENTS) if run.paged else 0
    return Need(f"train r={run.r} on {run.batch} x {run.length} tokens", parts, pageable)


def saved_in_layer(model: Model, run: Run, device: Device) -> int:
    """Bytes that autograd keeps of one layer for a token.

    - norms: their input in f32 (what the square is taken of).
    - attention: query, key and value and the output, in c; heads of keys and values repeated for all queries where
      there is a mask. The mask itself, as c for each pair of tokens. One f32 a head (the softmax's normalizer).
    - feed-forward: what goes into the activation, out of it, the other factor and the product, in c.
    - LoRA: the input of A in c; in 32 bits once for those that share it, in 16 bits each has its own cast. With dropout
      also what it multiplies with: a byte on a GPU, on a CPU an f32. The output of A in c.
    """
    c = device.value_bytes
    width = model.heads * model.head_dim
    before, after = model.inner
    elementwise = c * (before + (after if before > after else 0))
    attention = 4 * c * width + 4 * model.heads + c * run.length
    if run.dropout or c == 2:
        factor = 0 if not run.dropout else 1 if device.kind == "cuda" else 4
        inputs = model.in_layer(lambda rows, columns: (c + factor) * columns)
    else:
        inputs = c * (2 * model.hidden_size + after)
    outputs = model.in_layer(lambda rows, columns: c * run.r)
    return 4 * model.normalized + attention + elementwise + inputs + outputs


def _gradients(model: Model, run: Run, device: Device) -> int:
    """Bytes by token where a layer's backward holds most: the gradients of the input of its widest linear, through the
    weight, through LoRA and their sum; on a CPU dropout's are in f32."""
    through_lora = 4 + 4 if run.dropout and device.kind == "cpu" else device.value_bytes
    return (2 * device.value_bytes + through_lora) * max(columns for _, columns in model.linears.values())


def _optimizer_bytes(elements: int, bits: int) -> int:
    if bits == 32 or elements < _MIN_8BIT_ELEMENTS:
        return 8 * elements
    return 2 * (elements + 4 * math.ceil(elements / 256))
