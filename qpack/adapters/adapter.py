"""Reading a PEFT LoRA adapter: its settings and tensors, checked as far as that goes without the base.

What the tensors change in a base is `qpack.adapters.trained`'s matter. Refused by name is every setting by which an
adapter is not a change of the weights on disk: it computes otherwise for some inputs (aLoRA, Arrow), by another rule
(QALoRA, BD-LoRA, KaSA, ...), on other layers than the base has, or took something out of the base first (PiSSA, ...).
Reference: PEFT 0.21, ``tuners/lora`` and ``utils/save_and_load.py``; Hu et al., arXiv 2106.09685.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpack._core import digest_tensors, fingerprint, largest_values, read_header
from qpack.checkpoint import read_json_object
from qpack.errors import AdapterError, CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)

# What adapters hold beside pairs of factors, one for each weight.
_NOT_FACTORS = (
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
)

# Ways to draw the first factors that leave the base as it is. The others (PiSSA, OLoRA, LoftQ, ...) take something out
# of the base's weights: such an adapter is not a change of the base that is on disk.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")

MERGE_INSTEAD = "merge the adapter into its base (`qpack merge`), pack the result, and serve that"
"""What can be done with an adapter that an engine cannot apply."""

_PLAIN_TENSOR = re.compile(r"base_model\.model\..+\.lora_[AB]\.weight")
_FACTOR = re.compile(r"base_model\.model\..+\.(lora_[AB]\.weight|lora_embedding_[AB]|base_layer\.weight)")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A checked adapter directory.

    Raises:
        AdapterError: from `open` and `require_plain`, naming the directory, and the tensor or setting at fault.
    """

    path: Path
    config: Mapping[str, Any]
    """adapter_config.json"""
    tensors: Mapping[str, tuple[int, ...]]
    """Shapes by the names that PEFT gives them, which begin with ``base_model.model.``"""

    @classmethod
    def open(cls, path: Path | str) -> "Adapter":
        """Read and check ``path``: settings, and that all values are finite."""
        adapter = cls.open_header(path)
        adapter.largest_values()
        return adapter

    @classmethod
    def open_header(cls, path: Path | str) -> "Adapter":
        """Read and check settings, names and shapes of ``path``, but no values: those can be of any size."""
        path = Path(path)
        if not path.is_dir():
            raise AdapterError(f"{path}: not a directory")
        try:
            config = read_json_object(path / CONFIG_NAME)
            tensors = {info.name: info.shape for info in read_header(path / WEIGHTS_NAME)}
        except (CheckpointError, OSError) as error:
            raise AdapterError(_message(error)) from None
        _check_config(path, config)
        if not tensors:
            raise AdapterError(f"{path}: holds no tensors")
        return cls(path, config, tensors)

    @property
    def weights_path(self) -> Path:
        """The file that holds the tensors."""
        return self.path / WEIGHTS_NAME

    def fingerprint(self) -> str:
        """The digest of all tensors, which it reads, see `qpack.manifest`."""
        digests = {name: digest for _, name, digest in digest_tensors([self.weights_path])}
        infos = read_header(self.weights_path)
        return fingerprint([(info.name, info.dtype, info.shape, digests[info.name]) for info in infos])

    def largest_values(self) -> Mapping[str, float]:
        """The largest magnitude in each tensor of F32, F16 or BF16, all of them finite."""
        try:
            return largest_values(self.weights_path)
        except (CheckpointError, OSError) as error:
            raise AdapterError(_message(error)) from None

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(shape[0] for name, shape in self.tensors.items() if name.endswith(".lora_A.weight"))

    def rank_of(self, module: str) -> int:
        """The rank that the settings give ``module``."""
        return int(self._pattern("rank_pattern", module, self.config["r"]))

    def scale_of(self, module: str) -> float:
        """What the product of the factors of ``module`` is multiplied by."""
        r = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(r) if self.config.get("use_rslora") else r)

    def alpha_of(self, module: str) -> float:
        """The ``lora_alpha`` that the settings give ``module``."""
        return self._pattern("alpha_pattern", module, self.config["lora_alpha"])

    def require_plain(self) -> None:
        """Refuse all but plain LoRA on Linear weights, which is what an engine applies beside the base."""
        self._require_settings("fan_in_fan_out", *_NOT_FACTORS)
        self._require_tensors(_PLAIN_TENSOR, "a factor of a Linear weight")

    def require_factors(self) -> None:
        """Refuse all but pairs of factors, of Linear layers and embeddings, and the copies that PEFT saves of these."""
        self._require_settings(*_NOT_FACTORS)
        self._require_tensors(_FACTOR, "a factor of a weight")

    def _require_settings(self, *refused: str) -> None:
        for setting in refused:
            if self.config.get(setting):
                raise AdapterError(
                    f"{self.path}: {setting} is {self.config[setting]!r}, which is not plain LoRA; {MERGE_INSTEAD}"
                )
        if self.config.get("bias", "none") != "none":
            raise AdapterError(f"{self.path}: bias is {self.config['bias']!r}, expected 'none'; {MERGE_INSTEAD}")

    def _require_tensors(self, names: re.Pattern[str], what: str) -> None:
        for name, shape in self.tensors.items():
            if not names.fullmatch(name):
                raise AdapterError(f"{self.path}: tensor {name} of shape {shape} is not {what}")

    def _pattern(self, setting: str, module: str, default: float) -> float:
        """The value of the first pattern that matches ``module``, by PEFT's rule: a regex for a suffix of its name."""
        for pattern, value in (self.config.get(setting) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return default


def _message(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for setting in _UNSUPPORTED:
        if config.get(setting):
            raise AdapterError(f"{path}: {setting} is {config[setting]!r}, which is no change of the base's weights")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        init = config["init_lora_weights"]
        raise AdapterError(f"{path}: init_lora_weights is {init!r}, which changes the base too")
    for setting in ("r", "lora_alpha"):
        _check_number(path, setting, config.get(setting), whole=setting == "r")
    for setting in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(setting) or {}
        if not isinstance(patterns, dict):
            raise AdapterError(f"{path}: {setting} is {patterns!r}, expected numbers by pattern")
        for pattern, value in patterns.items():
            _check_number(path, f"{setting} of {pattern!r}", value, whole=setting == "rank_pattern")
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise AdapterError(f"{path}: {setting}: {pattern!r} is no regular expression: {error}") from None


def _check_number(path: Path, setting: str, value: object, *, whole: bool) -> None:
    kind = "whole number" if whole else "number"
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        if not whole or value == int(value):
            return
    raise AdapterError(f"{path}: {setting} is {value!r}, expected a {kind} over 0")
