"""Reading a PEFT LoRA adapter: which weights it changes, by which factors, at which scale.

Supported: plain LoRA on Linear weights, with rsLoRA, ``rank_pattern`` and ``alpha_pattern``. Every other kind is
refused by name, as is every tensor that is not one of a pair of factors: an adapter never does less than it says.
Reference: PEFT 0.21, ``tuners/lora`` and ``utils/save_and_load.py``; Hu et al., arXiv 2106.09685.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpack._core import check_finite, read_header
from qpack.checkpoint import Checkpoint, read_json_object
from qpack.errors import AdapterError, CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

# Settings of PEFT that change what the adapter computes, in ways that are not plain LoRA on Linear weights.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)

# Ways to draw the first factors that leave the base as it is. The others (PiSSA, OLoRA, LoftQ, ...) take something out
# of the base's weights: such an adapter is not a change of the base that is on disk.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True)
class Factors:
    """The change ``scale * B @ A`` of one weight, by the names of its factors in the adapter's file."""

    a: str
    """(r, in_features)"""
    b: str
    """(out_features, r)"""
    r: int
    scale: float
    shape: tuple[int, int]
    """(out_features, in_features) of the weight that is changed."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A checked adapter directory.

    Raises:
        AdapterError: from `open` and `check_base`, naming the directory, and the tensor or setting at fault.
    """

    path: Path
    config: Mapping[str, Any]
    """adapter_config.json"""
    factors: Mapping[str, Factors]
    """By the name of the weight that each pair changes."""

    @classmethod
    def open(cls, path: Path | str) -> "Adapter":
        """Read and check ``path``: settings, names and shapes of the factors, and that all values are finite."""
        path = Path(path)
        if not path.is_dir():
            raise AdapterError(f"{path}: not a directory")
        try:
            config = read_json_object(path / CONFIG_NAME)
            headers = {info.name: info.shape for info in read_header(path / WEIGHTS_NAME)}
            check_finite(path / WEIGHTS_NAME)
        except (CheckpointError, OSError) as error:
            raise AdapterError(_message(error)) from None
        _check_config(path, config)
        return cls(path, config, _pair_factors(path, config, headers))

    @property
    def weights_path(self) -> Path:
        """The file that holds the factors."""
        return self.path / WEIGHTS_NAME

    @property
    def rank(self) -> int:
        """The largest rank of any factor."""
        return max(factors.r for factors in self.factors.values())

    def check_base(self, base: Checkpoint | Path | str) -> None:
        """Check that ``base`` has every weight that the adapter changes, in the same shape."""
        checkpoint = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
        for name, factors in self.factors.items():
            shape = checkpoint.weights.get(name)
            if shape is None:
                raise AdapterError(f"{self.path}: changes {name}, which the base {checkpoint.directory} does not have")
            if shape != factors.shape:
                where = f"{name} of shape {factors.shape}"
                raise AdapterError(f"{self.path}: changes {where}; in the base {checkpoint.directory} it is {shape}")


def _message(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for setting in _UNSUPPORTED:
        if config.get(setting):
            raise AdapterError(f"{path}: {setting} is {config[setting]!r}, which is not plain LoRA")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias is {config['bias']!r}, expected 'none'")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        init = config["init_lora_weights"]
        raise AdapterError(f"{path}: init_lora_weights is {init!r}, which changes the base too")
    for setting in ("r", "lora_alpha"):
        value = config.get(setting)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise AdapterError(f"{path}: {setting} is {value!r}, expected a number over 0")


def _pair_factors(path: Path, config: Mapping[str, Any], headers: Mapping[str, tuple[int, ...]]) -> dict[str, Factors]:
    pairs: dict[str, dict[str, str]] = {}
    for name, shape in headers.items():
        match = _FACTOR.fullmatch(name)
        if match is None or len(shape) != 2:
            raise AdapterError(f"{path}: tensor {name} of shape {shape} is not a factor of a Linear weight")
        pairs.setdefault(match["module"], {})[match["factor"]] = name
    if not pairs:
        raise AdapterError(f"{path}: holds no factors")

    factors = {}
    for module, pair in sorted(pairs.items()):
        if len(pair) != 2:
            (present,) = pair.values()
            raise AdapterError(f"{path}: {present} has no partner")
        (r, in_features), (out_features, b_rank) = headers[pair["A"]], headers[pair["B"]]
        expected = _pattern(config, "rank_pattern", module, config["r"])
        if not r == b_rank == expected:
            raise AdapterError(f"{path}: the factors of {module} have ranks {r} and {b_rank}, expected {expected}")
        alpha = _pattern(config, "alpha_pattern", module, config["lora_alpha"])
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        factors[f"{module}.weight"] = Factors(pair["A"], pair["B"], r, scale, (out_features, in_features))
    return factors


def _pattern(config: Mapping[str, Any], setting: str, module: str, default: float) -> float:
    """The value of the first pattern that matches ``module``, by PEFT's rule: a regex for a suffix of its name."""
    for pattern, value in (config.get(setting) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return default
