"""``llm_int8_skip_modules``: the modules that a loader must leave alone, so that transformers and vLLM agree.

The two read the list differently. transformers 5.19 (``should_convert_module``) skips a module if an entry, taken as a
regular expression, matches the start of its full name, or if the name ends with the entry. vLLM's plugin 0.0.3
(``is_layer_skipped_bnb``) skips one if an entry equals a dotted prefix or a component of its name; its names are mostly
those on the hub, with q, k and v, or gate and up, fused into one module, and what it does not skip it quantizes while
loading. So entries are full names, in transformers' form, in the hub's form, and in vLLM's where it fuses.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable

# The modules that vLLM fuses into one, by its name for that (``packed_modules_mapping`` of its models).
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "w13": ("w1", "w3"),
}
_FUSED_NAME = {part: name for name, parts in _FUSED.items() for part in parts}
EXPERT = re.compile(r"(?P<experts>.+\.experts)\.\d+\.[^.]+")
"""The name of a layer of one expert: ``model.layers.0.mlp.experts.3.up_proj``."""


def fused_module(module: str) -> str:
    """vLLM's name for the module that ``module`` is fused into; its own if that is none.

    All experts of a layer are one module: ``model.layers.0.mlp.experts``.
    """
    if match := EXPERT.fullmatch(module):
        return match["experts"]
    parent, dot, leaf = module.rpartition(".")
    return f"{parent}{dot}{_FUSED_NAME.get(leaf, leaf)}"


def skips(entry: str, module: str) -> bool:
    """Whether transformers, given ``entry``, would leave ``module`` in 16 bits."""
    return re.match(entry, module) is not None or module.endswith(entry)


def skip_modules(kept: Iterable[str], packed: Collection[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The list for modules that are ``kept``, by all names that they go by, beside ``packed`` ones, by transformers'.

    Returns the entries, sorted, and those left out, each with a packed module that transformers would skip for it.
    """
    wanted = set(kept)
    aliases = Counter(fused_module(module) for module in wanted)
    wanted.update(alias for alias, parts in aliases.items() if parts > 1)
    entries, clashes = [], []
    for entry in sorted(wanted):
        hit = next((module for module in packed if skips(entry, module)), None)
        if hit is None:
            entries.append(entry)
        else:
            clashes.append((entry, hit))
    return entries, clashes


def towers(kept: Iterable[str], packed: Collection[str]) -> set[str]:
    """The shortest dotted prefixes of ``kept`` modules that are no prefix of a packed one: ``model.vision_tower``."""
    inside = {".".join(parts[:end]) for parts in (name.split(".") for name in packed) for end in range(len(parts) + 1)}
    found = set()
    for name in kept:
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        found.add(next((prefix for prefix in prefixes if prefix not in inside), name))
    return found
