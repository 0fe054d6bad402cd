"""Rules that change how tensors are stored, by name: the file behind ``--rules``.

A TOML file with a list of rules, tried in order on the full name of every tensor to be written; the first whose pattern
matches decides::

    [[rule]]
    match = "model.layers.0.*"          # a glob over the whole name; * also matches dots
    keep = true
    dtype = "float32"                   # of what is kept: bfloat16, float16 or float32; its own if not given

    [[rule]]
    match = "*.down_proj.weight"
    blocksize = 32
    double_quant = false

``pack = true`` packs the weight of a Linear that would be kept. What a rule says of packed weights leaves the others
that it matches as they are, and ``dtype`` leaves packed weights and whole numbers. Refused, naming file and rule:
unknown keys, contradictions, a rule that decides nothing, and one that would split what vLLM fuses. Routed experts that
a rule keeps have 16 bits in transformers; vLLM quantizes them while loading, whatever the list of modules to skip says.
"""

import fnmatch
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qpack._core import BLOCKSIZES
from qpack.errors import DataError

DTYPES = ("bfloat16", "float16", "float32")

_KEYS: dict[str, type] = {
    "match": str,
    "keep": bool,
    "pack": bool,
    "dtype": str,
    "blocksize": int,
    "double_quant": bool,
}


@dataclass(frozen=True, slots=True)
class Rule:
    """What to do with the tensors whose names match; None leaves a setting as it is."""

    match: str
    keep: bool = False
    pack: bool = False
    dtype: str | None = None
    blocksize: int | None = None
    double_quant: bool | None = None

    def matches(self, name: str) -> bool:
        """Whether the pattern matches the whole of ``name``."""
        return _regex(self.match).match(name) is not None


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of a file, in its order.

    Raises:
        DataError: from `read`, naming the file and the rule at fault.
    """

    path: Path
    rules: tuple[Rule, ...]

    @classmethod
    def read(cls, path: Path | str) -> "Rules":
        """Read and check a file."""
        path = Path(path)
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        except ValueError as error:
            raise DataError(f"{path}: not valid TOML: {error}") from None
        listed = content.pop("rule", None)
        if content or not isinstance(listed, list) or not listed:
            found = ", ".join(content) or "none"
            raise DataError(f"{path}: expected a list of [[rule]] and nothing else, found {found}")
        return cls(path, tuple(_rule(path, number, entry) for number, entry in enumerate(listed, 1)))

    def first(self, name: str) -> int | None:
        """Index of the rule that decides about the tensor ``name``."""
        return next((index for index, rule in enumerate(self.rules) if rule.matches(name)), None)

    def error(self, index: int, message: str) -> DataError:
        """What is wrong with a rule, to be raised."""
        return DataError(f"{self.path}: rule {index + 1} ({self.rules[index].match!r}) {message}")


@cache
def _regex(glob: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(glob))


def _rule(path: Path, number: int, entry: Any) -> Rule:
    where = f"{path}: rule {number}"
    if not isinstance(entry, Mapping) or not isinstance(entry.get("match"), str):
        raise DataError(f"{where} has no match, expected a pattern of names")
    where = f"{where} ({entry['match']!r})"
    for key, value in entry.items():
        if key not in _KEYS:
            raise DataError(f"{where} has the unknown key {key!r}, expected {', '.join(_KEYS)}")
        if type(value) is not _KEYS[key]:
            raise DataError(f"{where}: {key} is {value!r}, expected {_KEYS[key].__name__}")
    rule = Rule(**entry)
    packs = rule.pack or rule.blocksize is not None or rule.double_quant is not None
    if rule.keep and packs:
        raise DataError(f"{where} keeps and packs")
    if rule.pack and rule.dtype is not None:
        raise DataError(f"{where} packs, so dtype has no meaning")
    if not (rule.keep or packs or rule.dtype is not None):
        raise DataError(f"{where} says nothing of what it matches")
    if rule.dtype is not None and rule.dtype not in DTYPES:
        raise DataError(f"{where}: dtype is {rule.dtype!r}, expected one of {', '.join(DTYPES)}")
    if rule.blocksize is not None and rule.blocksize not in BLOCKSIZES:
        raise DataError(f"{where}: blocksize is {rule.blocksize}, expected one of {', '.join(map(str, BLOCKSIZES))}")
    return rule
