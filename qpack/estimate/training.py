"""Memory to train LoRA on a model, part by part, at the moment of a step when it is largest.

With c the bytes of a value in the dtype of the computation, and n = r * (out_features + in_features) for each weight
that LoRA is put on (and out_features more with DoRA), or its elements for what is trained whole:

- weights: packed ones as stored, all others in c. With ``fsdp`` a process has 1/N of the codes and of what is not
  packed, the scales whole, and whole for a while what is not packed, the codes of a layer and, fetched meanwhile, those
  of the next.
- adapters: 4n, in f32. Gradients: 4n, and with several processes 4n more, DDP's buckets.
- optimizer: two moments; in 32 bits 8n, in 8 bits with one f32 scale per 256 2n * (1 + 4/256), but 8n where A or B has
  fewer than 4096 elements. Of a paged optimizer, what has 10**5 elements or more can be paged.
- activations: what autograd keeps, see `_Kept`: of all layers, or with checkpointing their inputs and one layer, which
  is computed again; and what exists for a moment beside it.
- logits: by token and vocabulary 8 bytes, and c more in 16 bits: the logits, themselves in f32, and their log-softmax,
  and where the head learns 4 for their gradient; of `LOGITS_AT_A_TIME` of them at most (`qpack.training.log_probs`).
- workspace: the largest weight dequantized, and an allowance for what is not the model's.
- holes, on a CPU: what the C library's malloc keeps between what is used and cannot use again. Not derived: as seen
  with glibc 2.36, 200 MB and a quarter of the activations. Mapping each tensor by itself would leave none, and cost
  half as much time again.

A step may be largest at four moments: in the last layer, when all has been kept of the others; at the loss, with
logits; in the first layer's backward, when the gradients of the others are there; in the optimizer. At the first two
there are gradients only where a step takes several passes.

All sequences are taken to be ``max_length`` long, and of several in a batch one to be padded. DPO runs two for each
pair, and its reference keeps nothing.

Sources: QLoRA, arXiv 2305.14314; activation checkpointing, arXiv 2205.05198, section 5; transformers 5.19
(``models/llama``, ``integrations/sdpa_attention.py``); PEFT 0.21 (``tuners/lora/{bnb,dora}.py``); bitsandbytes 0.50
(``optim/optimizer.py``, ``autograd/_functions.py``: a frozen weight keeps nothing of its input); torch 2.13
(``optim/adam.py``, ``autocast_mode.cpp``: casts of weights live as long as the pass).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qpack.estimate.device import Device
from qpack.estimate.model import Model, in_attention, in_layer, layer_of
from qpack.estimate.need import Need
from qpack.training.settings import LOGITS_AT_A_TIME, TrainSettings, checkpointing, names_in

_PAGED_ELEMENTS = 10**5
"""Optimizer state of a smaller parameter is never paged (bitsandbytes, ``get_state_buffer``)."""

_MIN_8BIT_ELEMENTS = 4096
"""A smaller parameter has optimizer state in 32 bits (bitsandbytes, ``min_8bit_size``)."""

_HOLES = 200 * 10**6
"""Bytes that malloc keeps unused however little the activations are."""

_ONE_SEQUENCE = TrainSettings(batch_size=1, max_length=512)
_GPU = Device.gpu(24 * 10**9)


def training(model: Model, settings: TrainSettings = _ONE_SEQUENCE, device: Device = _GPU, processes: int = 1) -> Need:
    """To train with ``settings`` on ``device``, for one of ``processes``."""
    c = device.value_bytes
    targets = list(_targets(model, settings))
    whole = _whole(model, settings)
    parameters = [size for target in targets for size in target.parameters] + list(whole.values())
    states = [_optimizer_bytes(size, settings.optim) for size in parameters]
    adapters = 4 * sum(parameters)
    on_gpu = device.kind == "cuda"
    moment = max(_moments(model, settings, device, targets, whole), key=_Moment.bytes)
    parts = {
        "weights": _weights(model, c, processes if settings.fsdp else 1),
        "adapters": adapters,
        "gradients": moment.gradients + (adapters if processes > 1 else 0),
        "optimizer": sum(states),
        "activations": moment.activations,
        "logits": moment.logits,
        "workspace": c * model.largest + device.allowance,
    }
    if not on_gpu:
        parts["holes"] = _HOLES + moment.activations // 4
    paged = settings.optim.startswith("paged") and on_gpu
    pageable = sum(state for state, size in zip(states, parameters, strict=True) if size >= _PAGED_ELEMENTS)
    pairs = " x 2" if settings.method == "dpo" else ""
    purpose = f"train r={settings.r} on {settings.batch_size}{pairs} x {settings.max_length} tokens"
    return Need(purpose, parts, pageable if paged else 0)


# ---- what is there all the time ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Target:
    """A weight that LoRA is put on."""

    name: str
    rows: int
    """out_features"""
    columns: int
    """in_features"""
    r: int
    dora: bool

    @property
    def parameters(self) -> list[int]:
        """Elements of A, of B and of DoRA's magnitudes."""
        return [self.r * self.columns, self.r * self.rows, *([self.rows] if self.dora else [])]


def _targets(model: Model, settings: TrainSettings) -> Iterable[_Target]:
    """The weights that ``target_modules`` names, by PEFT's rules, each with its rank."""
    names = names_in(settings.target_modules)
    wanted = "|".join(map(re.escape, names)) or settings.target_modules
    for weight, (rows, columns) in model.linears.items():
        name = weight.removesuffix(".weight")
        if settings.target_modules == "all-linear":
            chosen = not model.is_head(weight)
        else:
            chosen = bool(re.fullmatch(rf"(.*\.)?({wanted})" if names else wanted, name))
        if chosen:
            patterns = settings.rank_pattern.items()
            ranks = (rank for pattern, rank in patterns if re.fullmatch(rf"(.*\.)?({pattern})", name))
            yield _Target(weight, rows, columns, next(ranks, settings.r), settings.use_dora)


def _whole(model: Model, settings: TrainSettings) -> Mapping[str, int]:
    """Elements of what ``modules_to_save`` names, by name."""
    names = "|".join(map(re.escape, names_in(settings.modules_to_save or "")))
    ends = re.compile(rf"(.*\.)?({names})\.\w+")
    return {name: math.prod(shape) for name, shape in model.kept.items() if names and ends.fullmatch(name)}


def _weights(model: Model, c: int, shards: int) -> int:
    if shards == 1:
        return model.bytes(kept=c)
    codes = {name: math.prod(shape) / 2 for name, shape in model.packed.items()}
    kept = model.bytes(kept=c) - model.packed_bytes
    scales = model.packed_bytes - sum(codes.values())
    gathered = kept + 2 * max(model.by_layer(codes).values(), default=0)
    return math.ceil((sum(codes.values()) + kept) / shards + scales + gathered)


def _optimizer_bytes(elements: int, optimizer: str) -> int:
    if not optimizer.endswith("8bit") or elements < _MIN_8BIT_ELEMENTS:
        return 8 * elements
    return 2 * (elements + 4 * math.ceil(elements / 256))


# ---- what comes and goes in a step -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Moment:
    """Bytes that are there at one moment of a step, beside what is there all the time."""

    activations: int = 0
    logits: int = 0
    gradients: int = 0

    def bytes(self) -> int:
        """In all."""
        return self.activations + self.logits + self.gradients


def _moments(
    model: Model, settings: TrainSettings, device: Device, targets: list[_Target], whole: Mapping[str, int]
) -> list[_Moment]:
    c, h = device.value_bytes, model.hidden_size
    kept = _Kept.of(model, settings, device, targets, whole)
    tokens, layers = kept.tokens, kept.layers
    of_layers = 4 * sum(size for target in targets for size in target.parameters)
    gradients = of_layers + 4 * sum(whole.values())
    before = gradients if settings.grad_accum > 1 else 0
    at_ends = [name for name in whole if not in_layer(name)]
    # Embeddings that are trained are in f32, and so are all sums to which the layers add.
    inputs = (4 if any("emb" in name for name in at_ends) else c) * h * tokens * layers
    if checkpointing(settings, device.kind):
        at_loss, in_last, in_first = inputs + kept.casts, inputs + kept.largest, inputs / max(layers, 1) + kept.largest
    else:
        at_loss, in_last, in_first = kept.all + kept.casts, kept.all + kept.casts, kept.largest
    # The embedded tokens, the residual stream, its normed copy and its gradient; at the loss the input of the last
    # norm in f32, and in c its output, the states learned and their derivatives.
    inside = kept.mask + 4 * c * h * tokens + _inside_linear(settings, device, targets, tokens)
    head = kept.mask + (4 + 4 * c) * h * tokens
    # A head that learns, be it as the input embedding, has its logits computed again, with their gradient.
    per_logit = 8 + (c if c == 2 else 0) + (4 if at_ends else 0)
    logits = per_logit * min(tokens * model.vocab_size, LOGITS_AT_A_TIME)
    # The optimizer's arithmetic on all parameters at once: torch's own, where it is for GPUs, takes a copy of them.
    copies = gradients if settings.optim == "adamw_torch" and device.kind == "cuda" else 0
    return [
        _Moment(math.ceil(in_last + inside), 0, before),
        _Moment(math.ceil(at_loss + head), logits, before),
        _Moment(math.ceil(in_first + inside), 0, gradients - of_layers // layers),
        _Moment(copies, 0, gradients),
    ]


@dataclass(frozen=True, slots=True)
class _Kept:
    """Bytes that autograd keeps of a pass until its backward.

    Of a layer, by token:

    - norms: their input in f32 (what the square is taken of).
    - attention: query, key, value and output in c, and one f32 a head (the softmax's normalizer).
    - feed-forward: what goes into the activation, out of it, and the other factor, in c.
    - LoRA: the input of A in c, the output of A in c, and with dropout what it multiplies with: a byte on a GPU, on a
      CPU an f32. Without dropout, those with the same input share it, but on a CPU in 16 bits, where PEFT casts it to
      f32 and autocast back for each.
    - DoRA: the output of the base and that of LoRA in c.

    Where sequences are padded or packed there is a mask, of which each layer keeps a copy in c, and keys and values
    are repeated for all heads. By weight: A and B in c, where that is not f32; with DoRA what it gets their product
    from, an identity of in_features, and with dropout the weight dequantized.
    """

    tokens: int
    layers: int
    """Those from the first that learns: nothing is kept of the others, nor of what comes before in the first."""
    all: float
    """Of all layers, but for `casts`."""
    largest: float
    """Of one layer, the largest, with its part of `casts`."""
    casts: float
    """Of A and B; they live as long as the forward pass whether or not the layers are computed again."""
    mask: float
    """The mask itself."""

    @classmethod
    def of(
        cls, model: Model, settings: TrainSettings, device: Device, targets: list[_Target], whole: Iterable[str]
    ) -> "_Kept":
        """What a run with ``settings`` keeps."""
        c, length = device.value_bytes, settings.max_length
        sequences = settings.batch_size * (2 if settings.method == "dpo" else 1)
        tokens, masked = sequences * length, settings.packing or sequences > 1
        pairs = sequences * length**2 if masked else 0

        first = min(map(layer_of, [*whole, *(target.name for target in targets)]), default=0)
        layers = max(model.layers - first, 1)
        width = model.heads * model.head_dim
        keys_values = 2 * width if masked or model.latent else model.cached
        before, after = model.inner
        attention = c * (2 * width + keys_values) + 4 * model.heads
        feed_forward = c * (before + (after if before > after else 0))
        layer = tokens * (4 * model.normalized + attention + feed_forward) + c * pairs
        begins = _begins(model, [*whole, *(target.name for target in targets if layer_of(target.name) == first)])
        before_first = {"attention": 0.0, "up": layer - tokens * feed_forward, "down": layer}[begins]

        lora = model.by_layer(_lora(model, settings, device, targets, tokens))
        casts = {target.name: 2.0 * target.r * (target.rows + target.columns) * (c == 2) for target in targets}
        return cls(
            tokens=tokens,
            layers=layers,
            all=layers * layer - before_first + sum(lora.values()),
            largest=layer + max(lora.values(), default=0) + max(model.by_layer(casts).values(), default=0),
            casts=sum(casts.values()),
            mask=pairs,
        )


def _begins(model: Model, learning: Sequence[str]) -> str:
    """Which part of a layer is the first of which anything is kept, by what is ``learning`` in it or before it.

    The feed-forward part has two: ``up`` reads what the attention has added to, ``down`` what is activated.
    """
    linear = [name for name in learning if name in model.linears and in_layer(name) and not in_attention(name)]
    if len(linear) < len(learning):
        return "attention"
    return "up" if any(model.linears[name][1] == model.hidden_size for name in linear) else "down"


def _lora(
    model: Model, settings: TrainSettings, device: Device, targets: list[_Target], tokens: int
) -> Mapping[str, float]:
    """Bytes that autograd keeps of the LoRA on each weight."""
    c, dropout = device.value_bytes, settings.lora_dropout > 0
    factor = 0 if not dropout else 1 if device.kind == "cuda" else 4
    shared = not dropout and (device.kind == "cuda" or c == 4)
    kept: dict[str, float] = {}
    seen = set()
    for target in targets:
        group = model.input_of(target.name)
        own = not shared or group not in seen
        seen.add(group)
        per_token = (c + factor) * target.columns * own + c * target.r
        by_weight = 0
        if target.dora:
            per_token += 2 * c * target.rows
            by_weight = c * target.columns * (target.columns + (target.rows if dropout else 0))
        kept[target.name] = tokens * model.share(target.name) * per_token + by_weight
    return kept


def _inside_linear(settings: TrainSettings, device: Device, targets: list[_Target], tokens: int) -> float:
    """Bytes that exist for a moment within the widest linear that has LoRA.

    In the backward the gradient of its input through the weight, and that through LoRA. On a CPU in 16 bits LoRA's
    input is in f32 for a moment, with dropout twice, while the linear's own is there. DoRA computes in f32: its result
    in three terms, and the weight with LoRA added to it.
    """
    if not targets:
        return 0
    c, widest = device.value_bytes, max(targets, key=lambda target: target.columns)
    per_value = 2 * c
    if device.kind == "cpu" and c == 2:
        per_value = c + (8 if settings.lora_dropout > 0 else 4)
    of_dora = 12 * widest.rows * tokens + 8 * widest.rows * widest.columns if widest.dora else 0
    return per_value * widest.columns * tokens + of_dora
