"""Making one adapter of several, as PEFT's ``add_weighted_adapter`` does.

::

    cat               factors side by side, A times weight and scale: the sum of the products, of the sum of the ranks
    linear            A and B each a weighted sum, by the root of weight and scale; of one rank, and only near the sum
    ties              as linear, of the ``density`` largest values of each factor that have the sign of the majority
    dare_linear       as linear, of a random ``density`` of each factor, over ``density``
    dare_ties         as dare_linear, of the values that have the sign of the majority
    magnitude_prune   as linear, of the ``density`` largest values of each factor

The arithmetic is PEFT's own functions, in f32; the result has their bits. Two things differ, where PEFT's result cannot
be used: modules of a lower rank than the adapter's are filled up with zeros to one rank (PEFT saves an adapter that it
cannot load), and the scale is always 1 (PEFT lets rsLoRA multiply a second time). All factors are held in memory.

Refused by name is what is more than pairs of factors: DoRA, saved modules, biases, trained tokens, experts' parameters.
Reference: PEFT 0.21, ``tuners/lora/model.py`` and ``utils/merge_utils.py``; TIES, arXiv 2306.01708; DARE, 2311.03099.
"""

import json
import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from qpack.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter
from qpack.checkpoint import Checkpoint
from qpack.errors import AdapterError

if TYPE_CHECKING:
    import torch

Weighted: TypeAlias = Sequence[tuple[Adapter, float]]
"""Adapters, each with its weight."""

DENSE = ("cat", "linear")
SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
KINDS = (*DENSE, *SPARSE)
_RANDOM = ("dare_linear", "dare_ties")


@dataclass(frozen=True, slots=True)
class Combination:
    """How several adapters become one.

    Raises:
        ValueError: for a value that is not legal, or that the kind has no use for, naming it.
    """

    kind: str = "cat"
    """One of `KINDS`, by PEFT's names."""
    density: float | None = None
    """Share of each factor's values that is kept: over 0, at most 1. Only for those that keep a part."""
    seed: int | None = None
    """Of the draw of what is kept; 0 if None. Only for ``dare_linear`` and ``dare_ties``."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"combine is {self.kind!r}, expected one of {', '.join(KINDS)}")
        if (self.density is not None) != (self.kind in SPARSE):
            raise ValueError(f"combine {self.kind}: density is {self.density}, it goes with {', '.join(SPARSE)}")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}, expected over 0 and at most 1")
        if self.seed is not None and self.kind not in _RANDOM:
            raise ValueError(f"combine {self.kind}: seed is {self.seed}, it goes with {', '.join(_RANDOM)}")


CAT = Combination()


def combine_factors(adapters: Weighted, combination: Combination, modules: Collection[str], directory: Path) -> Adapter:
    """Write the combination of ``adapters`` into ``directory``: weights in f32 and their settings; return it opened.

    ``modules`` are the names of all modules of the base that have weights, to tell those of the adapters from.

    Raises:
        AdapterError: for adapters that hold more than factors, or whose ranks or settings cannot be combined.
    """
    rank = _check(adapters, combination)
    pairs = _pairs(adapters)
    factors = _combined(adapters, pairs, combination, rank)
    from safetensors.torch import save_file

    save_file(factors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    config = json.dumps(_config(adapters[0][0], rank, pairs, modules), indent=2, sort_keys=True)
    (directory / CONFIG_NAME).write_text(config + "\n", encoding="utf-8")
    return Adapter.open(directory)


def module_names(base: Checkpoint) -> frozenset[str]:
    """The names of all modules of ``base`` that have a weight."""
    return frozenset(name.removesuffix(".weight") for name in base.weights if name.endswith(".weight"))


def describe(combination: Combination, adapters: Weighted) -> dict[str, Any]:
    """What a combined adapter's record says of it: the same for the same inputs, wherever they are."""
    parts = [[adapter.path.resolve().name, adapter.fingerprint(), weight] for adapter, weight in adapters]
    return {"combine": asdict(combination), "adapters": parts}


def _check(adapters: Weighted, combination: Combination) -> int:
    """Refuse what cannot be combined; return the rank of the result, which is PEFT's."""
    first = adapters[0][0]
    for adapter, _ in adapters:
        adapter.require_factors()
        tying, other = (bool(each.config.get("ensure_weight_tying")) for each in (adapter, first))
        if tying != other:
            raise AdapterError(f"{adapter.path}: ensure_weight_tying is {tying}, in {first.path} it is {other}")
    if combination.kind == "cat":
        return sum(_largest_rank(adapter) for adapter, _ in adapters)
    rank = _largest_rank(first)
    for adapter, _ in adapters:
        if (found := _largest_rank(adapter)) != rank:
            raise AdapterError(
                f"{adapter.path}: has rank {found}, {first.path} has {rank}; {combination.kind} takes equal ones, "
                "cat any"
            )
    return rank


def _largest_rank(adapter: Adapter) -> int:
    """What PEFT goes by: the largest that the settings give any module, whether or not there is such a module."""
    return int(max(adapter.config["r"], *(adapter.config.get("rank_pattern") or {}).values(), 0))


def _pairs(adapters: Weighted) -> dict[str, dict[int, tuple[str, str]]]:
    """Names of the factors A and B of every module, by the number of the adapter that has them."""
    pairs: dict[str, dict[int, tuple[str, str]]] = {}
    for number, (adapter, _) in enumerate(adapters):
        for a in adapter.tensors:
            for one, other in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
                if a.endswith(f".{one}"):
                    module = a.removesuffix(f".{one}")
                    pairs.setdefault(module, {})[number] = (a, f"{module}.{other}")
    return dict(sorted(pairs.items()))


def _combined(
    adapters: Weighted, pairs: dict[str, dict[int, tuple[str, str]]], combination: Combination, rank: int
) -> "dict[str, torch.Tensor]":
    """The factors by name, filled up to ``rank``. What is random is drawn module by module, in the order of names."""
    import torch
    from safetensors import safe_open
    from torch.nn.functional import pad

    files: list[Any] = [safe_open(adapter.weights_path, "pt") for adapter, _ in adapters]
    factors = {}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(combination.seed or 0)
        for module, found in pairs.items():
            name = module.removeprefix("base_model.model.")
            scales = [(adapters[number][1], adapters[number][0].scale_of(name)) for number in found]
            a = [files[number].get_tensor(names[0]).float() for number, names in found.items()]  # (r, in_features)
            b = [files[number].get_tensor(names[1]).float() for number, names in found.items()]  # (out_features, r)
            if combination.kind == "cat":
                left = torch.cat([factor * weight * scale for factor, (weight, scale) in zip(a, scales, strict=True)])
                right = torch.cat(b, dim=1)
            else:
                ranks = {adapters[number][0].path: len(factor) for number, factor in zip(found, a, strict=True)}
                if len(set(ranks.values())) > 1:
                    shown = ", ".join(f"{r} in {path}" for path, r in ranks.items())
                    raise AdapterError(f"{name} has rank {shown}; {combination.kind} takes equal ones, cat any")
                left, right = _arithmetic(a, b, [weight * scale for weight, scale in scales], combination)
            a_name, b_name = next(iter(found.values()))
            factors[a_name] = pad(left, (0, 0, 0, rank - len(left)))
            factors[b_name] = pad(right, (0, rank - right.shape[1])).contiguous()
    return factors


def _arithmetic(
    a: "list[torch.Tensor]", b: "list[torch.Tensor]", scales: list[float], combination: Combination
) -> "tuple[torch.Tensor, torch.Tensor]":
    """PEFT's own rule for both factors; the sign of a negative scale goes to A alone, else the two would cancel."""
    import torch
    from peft.utils import merge_utils

    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    if combination.kind == "linear":
        return merge_utils.task_arithmetic(a, torch.tensor(signed)), merge_utils.task_arithmetic(b, torch.tensor(roots))
    rule = getattr(merge_utils, combination.kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density 1.0 is greater than or equal to 1")  # as asked for
        return (
            rule(a, torch.tensor(signed), combination.density),
            rule(b, torch.tensor(roots), combination.density),
        )


def _config(first: Adapter, rank: int, pairs: Collection[str], modules: Collection[str]) -> dict[str, Any]:
    """adapter_config.json: that of the first, for all modules, of one rank and without a scale."""
    config = {key: value for key, value in first.config.items() if key not in ("auto_mapping", "eva_config")}
    for key in ("exclude_modules", "layers_pattern", "layers_to_transform"):
        config[key] = None
    names = [name.removeprefix("base_model.model.") for name in pairs]
    leaves = {name.rpartition(".")[2] for name in names}
    reached = {name for name in modules if name.rpartition(".")[2] in leaves}
    return config | {
        "alpha_pattern": {},
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "r": rank,
        "rank_pattern": {},
        "target_modules": sorted(leaves if reached <= set(names) else names),
        "use_rslora": False,
    }
