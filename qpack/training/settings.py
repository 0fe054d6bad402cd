"""The hyper-parameters of a training run, checked when they are made, and the YAML file that can hold them.

The defaults follow the QLoRA paper (arXiv 2305.14314, table 9 and appendix B) in what carries over to any size: all
linear layers, dropout 0.05, learning rate 2e-4 held constant, gradient norm 0.3, paged AdamW.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qpack.data.options import FORMATS, LOSSES, ON_BAD_ROW
from qpack.errors import DataError

BASES = ("4bit", "16bit")
"""What a base is: packed, or a checkpoint as it is on the hub."""

METHODS = ("sft", "dpo")
"""Supervised fine-tuning, and direct preference optimization."""

OPTIMIZERS = ("paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch")
"""The optimizers offered, by the names that transformers gives them."""

TRACKERS = ("tensorboard", "wandb", "mlflow")
"""Where a run can be reported to."""

SCHEDULERS = ("constant_with_warmup", "linear", "cosine")
"""The learning-rate schedules offered: each one honours ``warmup_steps`` (plain ``constant`` would ignore it)."""

LOGITS_AT_A_TIME = 1 << 25
"""How many logits the loss is computed from at a time; enough for products with the head to be at full speed."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Hyper-parameters of one run; an impossible value raises :class:`~qpack.errors.DataError` naming its field.

    Attributes:
        base: what the base is, one of :data:`BASES`; ``16bit`` trains plain LoRA on an unpacked checkpoint.
        r: rank of the LoRA matrices.
        lora_alpha: the adapter's output is scaled by ``lora_alpha / r``.
        lora_dropout: share of the adapter's inputs dropped while training.
        target_modules: what LoRA is put on: ``all-linear`` (but for the output head), names of modules separated by
            commas (``q_proj,v_proj``) or in a list, or a regular expression for their full names.
        modules_to_save: modules to train whole, as float32 copies: the ends of their names, separated by commas or in a
            list (``embed_tokens,lm_head``). vLLM does not serve such an adapter.
        rank_pattern: other ranks than ``r``, by a regular expression for the end of a module's name.
        alpha_pattern: other values than ``lora_alpha``, likewise.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` (arXiv 2312.03732).
        use_dora: learn the magnitude of every row of a weight apart from its direction (arXiv 2402.09353); slower.
        init_from_error: directory of the checkpoint that the base was packed from: LoRA begins as the best correction
            of rank ``r`` of what packing has lost. None: as nothing.
        loraplus_lr_ratio: LoRA+ (arXiv 2402.12354): how many times ``lr`` the rate of every B matrix is. None: 1.
        gradient_checkpointing: keep only the inputs of the layers and compute the rest again in the backward pass.
            None: on a GPU; on a CPU memory is rarely what runs out, and recomputing costs a third.
        lr: peak learning rate.
        lr_scheduler: how the rate goes on after the warm-up, one of :data:`SCHEDULERS`.
        warmup_steps: steps over which the rate climbs from zero; must be fewer than the steps of the run.
        epochs: passes over the data; a fraction is allowed. ``max_steps`` takes precedence.
        max_steps: optimizer steps, whatever the size of the data.
        batch_size: sequences in one forward pass.
        grad_accum: forward passes in one optimizer step.
        format: what every row of the data is, one of :data:`~qpack.data.FORMATS`; None: told by its fields.
        loss: which tokens of a conversation are learned, one of :data:`~qpack.data.LOSSES`.
        chat_template: a Jinja file that takes the place of the tokenizer's own template.
        on_bad_row: what a row that cannot be used does, one of :data:`~qpack.data.ON_BAD_ROW`.
        max_length: longest sequence in tokens; longer ones are cut at their end, and the report counts them.
        packing: fill every sequence up to ``max_length`` with short ones, which do not see each other.
        group_by_length: make batches of sequences of like length, so that little is padded; of no effect with packing.
        weight_decay: AdamW's, on the adapter's matrices.
        max_grad_norm: gradients are scaled down to this norm.
        optim: one of :data:`OPTIMIZERS`. Paging needs a GPU; on a CPU the unpaged twin is used and reported.
        save_steps: steps between two checkpoints, from which an interrupted run goes on; by default a twentieth of the
            run and at most 100.
        keep: how many of the last checkpoints stay while the run lasts.
        eval_split: share of the data to hold out for evaluation, whole rows drawn by the seed.
        eval_steps: steps between two evaluations; by default a tenth of the run. One more follows the last step.
        early_stopping: stop after so many evaluations in a row without a new best one.
        method: ``sft``: learn the answers as they stand; ``dpo``: prefer one of two.
        beta: how dear it is to DPO to leave the base: a reward is ``beta`` times a log-probability gained over it.
        fsdp: of several processes each holds a part of the base, not all of it.
        samples: prompts of the data that base and adapter answer when training is done, for report.html.
        report_to: trackers that show the run, any of :data:`TRACKERS`.
        seed: decides the initial adapter, the order of the data and the dropout.
    """

    base: str = "4bit"
    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    target_modules: str = "all-linear"
    modules_to_save: str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    init_from_error: str | None = None
    loraplus_lr_ratio: float | None = None
    gradient_checkpointing: bool | None = None
    lr: float = 2e-4
    lr_scheduler: str = "constant_with_warmup"
    warmup_steps: int = 0
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 8
    grad_accum: int = 1
    format: str | None = None
    loss: str = "assistant"
    chat_template: str | None = None
    on_bad_row: str = "fail"
    max_length: int = 1024
    packing: bool = False
    group_by_length: bool = True
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    optim: str = "paged_adamw_8bit"
    save_steps: int | None = None
    keep: int = 2
    eval_split: float | None = None
    eval_steps: int | None = None
    early_stopping: int | None = None
    method: str = "sft"
    beta: float = 0.1
    fsdp: bool = False
    samples: int = 2
    report_to: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse wrong types and values out of range; a field may be None where that is its default."""
        # The way of a frozen dataclass to hold what its checks have worked out.
        for name in ("target_modules", "modules_to_save"):
            object.__setattr__(self, name, _joined(getattr(self, name)))
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value is not None or setting.default is not None:
                _CHECKS[setting.name](setting.name, value)
        _refuse_together(self)


def names_in(text: str) -> list[str]:
    """The names of modules in a text such as ``q_proj,v_proj``; none if it is something else."""
    return re.split(r"\s*,\s*", text.strip()) if _NAMES.fullmatch(text) else []


def checkpointing(settings: TrainSettings, device: str) -> bool:
    """Whether a run on ``cuda`` or ``cpu`` computes activations again instead of keeping them."""
    return device == "cuda" if settings.gradient_checkpointing is None else settings.gradient_checkpointing


def _refuse_together(settings: TrainSettings) -> None:
    """Refuse settings that are each possible, but not with each other."""
    dpo, plain = settings.method == "dpo", settings.base == "16bit"
    from_error = settings.init_from_error is not None
    whole = names_in(settings.modules_to_save or "")
    twice = [name for name in names_in(settings.target_modules) if name in whole]
    conflicts = {
        f"modules_to_save: {', '.join(twice)} stands in target_modules too; name it in one of them": bool(twice),
        "packing: not for method 'dpo', which compares sequences with each other": settings.packing and dpo,
        "init_from_error: not for method 'dpo', whose reference is the base without it": from_error and dpo,
        "init_from_error: not for base '16bit', which has lost nothing": from_error and plain,
        "init_from_error: not with use_dora, whose norms would be those of another weight": (
            from_error and settings.use_dora
        ),
        "fsdp: shards packed bases, not base '16bit'": settings.fsdp and plain,
        "modules_to_save: copies whole modules, which no process has with fsdp": (
            settings.fsdp and settings.modules_to_save is not None
        ),
        "use_dora: needs whole weights for their norms, which no process has with fsdp": (
            settings.fsdp and settings.use_dora
        ),
    }
    for message, found in conflicts.items():
        if found:
            raise DataError(message)


def load_settings(path: Path | str, **overrides: Any) -> TrainSettings:
    """Read settings from a YAML file of ``field: value`` lines; ``overrides`` win over the file.

    Raises:
        DataError: the file cannot be read or parsed, holds a key that is no setting, or a value that is not allowed.
    """
    path = Path(path)
    values = _read_yaml(path)
    known = [one.name for one in fields(TrainSettings)]
    for key in values:
        if key not in known:
            raise DataError(f"{path}: unknown setting {key!r}, expected one of {', '.join(known)}")
    try:
        TrainSettings(**values)  # so that an override never hides a bad value in the file
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return TrainSettings(**{**values, **overrides})


def _read_yaml(path: Path) -> dict[Any, Any]:
    """Return the mapping that the file holds; an empty file is an empty mapping."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1, which takes ``2e-4`` for text, with the floats of YAML 1.2."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))
    try:
        # Loader is a SafeLoader: it builds plain values only.
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected 'field: value' lines, found a {type(values).__name__}")
    return values


_NAMES = re.compile(r"\s*[\w.]+(\s*,\s*[\w.]+)*\s*")


def _joined(value: Any) -> Any:
    """A list of names, or a text with spaces between them, as the text that `names_in` takes; all else as it is."""
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        value = ",".join(value)
    return ",".join(names_in(value)) or value if isinstance(value, str) else value


Check = Callable[[str, Any], None]
"""Takes a field's name and value, and raises a DataError for a value that is not allowed."""


def _integer(minimum: int) -> Check:
    def check(name: str, value: Any) -> None:
        if type(value) is not int:  # a bool is an int to isinstance
            raise DataError(f"{name}: expected an integer, found {value!r}")
        if value < minimum:
            raise DataError(f"{name}: expected at least {minimum}, found {value}")

    return check


def _number(allowed: Callable[[float], bool], what: str) -> Check:
    def check(name: str, value: Any) -> None:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise DataError(f"{name}: expected a finite number, found {value!r}")
        if not allowed(value):
            raise DataError(f"{name}: expected {what}, found {value}")

    return check


def _choice(choices: tuple[str, ...]) -> Check:
    def check(name: str, value: Any) -> None:
        if value not in choices:
            raise DataError(f"{name}: expected one of {', '.join(choices)}, found {value!r}")

    return check


def _flag(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise DataError(f"{name}: expected true or false, found {value!r}")


def _file(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise DataError(f"{name}: expected the path of a file, found {value!r}")


def _trackers(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple):
        raise DataError(f"{name}: expected a list of {', '.join(TRACKERS)}, found {value!r}")
    for one in value:
        _choice(TRACKERS)(name, one)


def _directory(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise DataError(f"{name}: expected the path of a directory, found {value!r}")


def _targets(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise DataError(f"{name}: expected all-linear, names or a regular expression, found {value!r}")
    _require_regex(name, value)


def _names(name: str, value: Any) -> None:
    if not isinstance(value, str) or not names_in(value):
        raise DataError(f"{name}: expected names of modules, separated by commas, found {value!r}")


def _pattern(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise DataError(f"{name}: expected regular expressions with a number each, found {value!r}")
    for pattern, number in value.items():
        _COUNT(f"{name}[{pattern!r}]", number)
        _require_regex(name, pattern)


def _require_regex(name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise DataError(f"{name}: {pattern!r} is not a regular expression: {error}") from None


_COUNT = _integer(minimum=1)
_POSITIVE = _number(lambda value: value > 0, "more than 0")

_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("r", "lora_alpha", "batch_size", "grad_accum", "max_steps"), _COUNT),
    **dict.fromkeys(("keep", "save_steps", "eval_steps", "early_stopping"), _COUNT),
    **dict.fromkeys(("warmup_steps", "seed", "samples"), _integer(minimum=0)),
    **dict.fromkeys(("lr", "epochs", "max_grad_norm", "beta"), _POSITIVE),
    **dict.fromkeys(("fsdp", "packing", "group_by_length", "gradient_checkpointing", "use_rslora", "use_dora"), _flag),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _pattern),
    "target_modules": _targets,
    "modules_to_save": _names,
    "init_from_error": _directory,
    "base": _choice(BASES),
    "max_length": _integer(minimum=2),  # one token to read, one to predict
    "lora_dropout": _number(lambda value: 0 <= value < 1, "at least 0 and less than 1"),
    "loraplus_lr_ratio": _number(lambda value: value >= 1, "at least 1"),
    "weight_decay": _number(lambda value: value >= 0, "at least 0"),
    "eval_split": _number(lambda value: 0 < value < 1, "more than 0 and less than 1"),
    "format": _choice(FORMATS),
    "loss": _choice(LOSSES),
    "on_bad_row": _choice(ON_BAD_ROW),
    "method": _choice(METHODS),
    "optim": _choice(OPTIMIZERS),
    "lr_scheduler": _choice(SCHEDULERS),
    "chat_template": _file,
    "report_to": _trackers,
}
