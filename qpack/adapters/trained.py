"""What an adapter changes in a base, weight by weight: PEFT's tensors as `qpack.adapters.changes`.

::

    M.lora_A.weight (r, in), M.lora_B.weight (out, r)                   M.weight + scale * B @ A
    M.lora_embedding_A (r, vocabulary), M.lora_embedding_B (hidden, r)  M.weight + scale * (B @ A).T
    M.lora_magnitude_vector                                             DoRA: the norms of the sum, by output
    experts.lora_A.weight (experts * r, in), B (out, r * experts)       ``target_parameters``: each expert's own product
    experts.3.up_proj.lora_A.weight ...                                 rows of what the base has of all experts
    M.token_adapter.trainable_tokens_delta (tokens, hidden)             rows of M.weight
    any other name                                                      the tensor itself: modules_to_save, biases

PEFT puts ``base_layer.`` before what belongs to a wrapped module; each of several parameters of one module wraps the
module once more, the first one innermost. Names must be those of the base's checkpoint; where asked for they may be
those of the model that the adapter was trained on, see `qpack.policy.places`. An output embedding that is
tied to the input embedding becomes a tensor of its own where only one of the two changes, so that the result computes
what the adapter's model did. Every tensor must be of use: one error lists all that are not.
Reference: PEFT 0.21, ``tuners/lora/layer.py`` (``ParamWrapper``), ``dora.py``, ``tuners/trainable_tokens``.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from qpack.adapters.adapter import Adapter
from qpack.adapters.changes import AnyChange, Change, LowRank, Replace, ReplaceRows, Stored, View
from qpack.adapters.folding import fold
from qpack.checkpoint import Checkpoint
from qpack.errors import AdapterError
from qpack.policy.modules import OUTPUT_EMBEDDING
from qpack.policy.places import Place, Places, find_places

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_[AB]|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)"
)
_INPUT_EMBEDDING = re.compile(r"(.+\.)?(embed_tokens|wte|word_embeddings)\.weight")
_HEAD = f"{OUTPUT_EMBEDDING}.weight"
_PARAMETERS = ("gate_up_proj", "down_proj")
"""Of fused experts, in the order in which transformers' modules declare them, and PEFT wraps them."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What an adapter makes of the weights of one base."""

    by_weight: Mapping[str, AnyChange]
    untied: bool
    """Whether the output embedding gets weights of its own, which the base ties to the input embedding."""


def changes(
    adapter: Adapter, base: Checkpoint, transposed: Collection[str], *, weight: float = 1.0, by_model: bool = False
) -> Changes:
    """Find what ``adapter`` changes in ``base``, whose weights ``transposed`` lie as (in_features, out_features).

    ``weight`` multiplies the low-rank changes, and can be other than 1 only where all changes are such. ``by_model``
    takes names that the checkpoint does not have for the model's, and experts one by one or all of a layer at once.

    Raises:
        AdapterError: a tensor changes nothing of the base, has no partner, or another shape than the base's weight, or
            is not of a change that has a weight.
    """
    reader = _Reader(adapter, base, frozenset(transposed), weight, by_model=by_model)
    found = reader.read()
    for name, change in found.items():
        if weight != 1 and not (isinstance(change, Change) and change.magnitude is None):
            raise AdapterError(
                f"{adapter.path}: its weight is {weight:g}, but what it does to {name} is no sum that could be "
                "multiplied; expected 1"
            )
    return _untie(reader, found)


def input_embedding(base: Checkpoint) -> str | None:
    """The name of the input embedding's weight, if it has one of the usual ones."""
    return next((name for name in base.weights if _INPUT_EMBEDDING.fullmatch(name)), None)


class _Reader:
    def __init__(
        self, adapter: Adapter, base: Checkpoint, transposed: frozenset[str], weight: float, *, by_model: bool
    ) -> None:
        self.adapter, self.base = adapter, base
        self._transposed, self._weight, self._by_model = transposed, weight, by_model
        self.tied = bool(base.config.get("tie_word_embeddings", _HEAD not in base.weights))
        self.input = input_embedding(base)

    def read(self) -> dict[str, AnyChange]:
        parts: dict[str, dict[str, str]] = {}
        found: dict[str, AnyChange] = {}
        unmatched = []
        for key, shape in self.adapter.tensors.items():
            name = key.removeprefix(_PREFIX)
            match = _PART.fullmatch(name)
            if match:
                parts.setdefault(match["module"], {})[match["part"]] = key
                continue
            name = name.replace(".base_layer.", ".")
            if not key.startswith(_PREFIX) or (name not in self.base.weights and name != _HEAD):
                unmatched.append(key)
                continue
            self._require_shape(key, name, shape)
            if key.endswith(".base_layer.weight"):
                self._require_same(key, name)
            else:
                found[name] = Replace(self._stored(key))
        for module, pair in sorted(parts.items()):
            unmatched += self._add(found, module, pair)
        if unmatched:
            raise self._unmatched(unmatched)
        return found

    def _add(self, found: dict[str, AnyChange], module: str, pair: Mapping[str, str]) -> Collection[str]:
        """Put what belongs to ``module`` into ``found``; return the keys that are of nothing in the base."""
        weight = self._weight_of(module)
        terms = self._elsewhere(module, pair) if weight is None else []
        for name, term in terms:
            found[name] = self._with_term(found.get(name), term, name, pair)
        if weight in found:
            raise AdapterError(f"{self.adapter.path}: changes {weight} by {min(pair.values())} and by itself")
        if weight is not None:
            found[weight] = self._change(module, weight, pair)
        return () if weight is not None or terms else pair.values()

    def _unmatched(self, keys: list[str]) -> AdapterError:
        base, names = self.base.directory, ", ".join(fold(keys))
        return AdapterError(f"{self.adapter.path}: changes what the base {base} does not have: {names}")

    @cached_property
    def _places(self) -> Places:
        """Where the base holds what only the model has so; needed, and found, only where the base's names do not do."""
        return find_places(self.base) if self._by_model else Places({}, {})

    def _elsewhere(self, module: str, pair: Mapping[str, str]) -> list[tuple[str, LowRank]]:
        """What ``module`` of the model adds to weights of the base, by their names; nothing if the base lacks it."""
        if pair.keys() != {"lora_A.weight", "lora_B.weight"}:
            return []
        a, b = pair["lora_A.weight"], pair["lora_B.weight"]
        if place := self._places.weights.get(f"{module}.weight"):
            return [(place.name, self._in_rows(module, place, a, b))]
        plain = module.removesuffix(".base_layer")
        targets = [leaf for leaf in self._targets() if f"{plain}.{leaf}" in self._places.parameters]
        depth = 1 if module == plain else 2
        if len(targets) < depth:
            return []
        parameter = f"{plain}.{targets[-depth]}"
        return self._single_experts(parameter, self._places.parameters[parameter], a, b)

    def _with_term(self, before: AnyChange | None, term: LowRank, name: str, pair: Mapping[str, str]) -> Change:
        if not isinstance(before, Change | None):
            raise AdapterError(f"{self.adapter.path}: changes {name} by {min(pair.values())} and by itself")
        return Change((*before.terms, term) if before else (term,))

    def _in_rows(self, module: str, place: Place, a: str, b: str) -> LowRank:
        """The product of one module, for its place."""
        if place.interleaved:
            raise AdapterError(
                f"{self.adapter.path}: {module} is of one expert, but {self.base.directory} holds all of a layer in "
                f"{place.name}, two of each in alternate columns: it is served as it is, and not merged"
            )
        shape = self.base.weights[place.name]
        rows, columns = math.prod(shape[:-1]), shape[-1]
        first, last = place.rows or (0, rows)
        (r, inputs), (outputs, b_rank) = self._shapes(a, b)
        transposed = place.name in self._transposed
        expected = (last - first, columns)
        self._require_shape(a, place.name, (inputs, outputs) if transposed else (outputs, inputs), expected)
        self._require_rank(module, r, b_rank)
        left, right = View(self._stored(b), (r, 1)), View(self._stored(a), (inputs, 1))
        if transposed:
            left, right = _transpose(right), _transpose(left)
        return LowRank(left, right, r, self._scale(module), place.rows)

    def _single_experts(
        self, parameter: str, experts: tuple[tuple[str, ...], ...], a: str, b: str
    ) -> list[tuple[str, LowRank]]:
        """The products of a parameter of all experts, each cut into the weights that stand one below the other."""
        stacked, inputs, outputs = self._stacked(parameter, len(experts), a, b)
        r = stacked // len(experts)
        terms = []
        for number, names in enumerate(experts):
            shapes = [self.base.weights[name] for name in names]
            self._require_shape(a, names[0], (outputs, inputs), (sum(rows for rows, _ in shapes), shapes[0][1]))
            right = View(self._stored(a), (inputs, 1), number * r * inputs)
            first = 0
            for name, (rows, _) in zip(names, shapes, strict=True):
                left = View(self._stored(b), (stacked, len(experts)), number + first * stacked)
                terms.append((name, LowRank(left, right, r, self._scale(parameter))))
                first += rows
        return terms

    def _stacked(self, parameter: str, experts: int, a: str, b: str) -> tuple[int, int, int]:
        """Rank of all experts together, in_features and out_features of the factors of one parameter."""
        (stacked, inputs), (outputs, b_rank) = self._shapes(a, b)
        self._require_rank(parameter, stacked // experts, b_rank // experts)
        if stacked % experts or b_rank != stacked:
            raise AdapterError(f"{self.adapter.path}: {a} has {stacked} rows for {experts} experts")
        return stacked, inputs, outputs

    def _targets(self) -> list[str]:
        """The parameters that are targets, the innermost first."""
        named = [target.rpartition(".")[2] for target in self.adapter.config.get("target_parameters") or ()]
        return [leaf for leaf in _PARAMETERS if leaf in named]

    def _weight_of(self, module: str) -> str | None:
        """The base's name of what ``module`` changes: its weight, or one of its parameters."""
        plain = module.removesuffix(".base_layer")
        if module == plain and (f"{module}.weight" in self.base.weights or f"{module}.weight" == _HEAD):
            return f"{module}.weight"
        targets = [leaf for leaf in self._targets() if f"{plain}.{leaf}" in self.base.weights]
        depth = 1 if module == plain else 2  # from the outside
        return f"{plain}.{targets[-depth]}" if len(targets) >= depth else None

    def _change(self, module: str, name: str, pair: Mapping[str, str]) -> AnyChange:
        if key := pair.get("token_adapter.trainable_tokens_delta"):
            if len(pair) > 1:
                raise AdapterError(f"{self.adapter.path}: {module} has trained tokens and factors")
            return ReplaceRows(self._stored(key), self._tokens(module))
        embedding = "lora_embedding_A" in pair or "lora_embedding_B" in pair
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        if any(part not in pair for part in names):
            raise AdapterError(f"{self.adapter.path}: {min(pair.values())} has no partner")
        a, b = (pair[part] for part in names)
        of = None
        if name not in self.base.weights:
            if not self.tied or self.input is None:
                raise AdapterError(f"{self.adapter.path}: {a} changes {name}, which the base does not have")
            of = self.input
        shape = self.base.weights[of or name]
        if len(shape) == 3:
            return self._experts(name, shape, a, b)
        transposed = embedding or name in self._transposed
        (r, inputs), (outputs, b_rank) = self._shapes(a, b)
        self._require_shape(a, name, (inputs, outputs) if transposed else (outputs, inputs), shape)
        self._require_rank(module, r, b_rank)
        left, right = View(self._stored(b), (r, 1)), View(self._stored(a), (inputs, 1))
        if transposed:
            left, right = _transpose(right), _transpose(left)
        term = LowRank(left, right, r, self._scale(module))
        magnitude = pair.get("lora_magnitude_vector")
        return Change((term,), self._stored(magnitude) if magnitude else None, bool(magnitude) and transposed, of)

    def _experts(self, name: str, shape: tuple[int, ...], a: str, b: str) -> Change:
        """One product an expert: A is stacked by experts, in B the experts alternate."""
        experts, rows, _ = shape
        stacked, inputs, outputs = self._stacked(name, experts, a, b)
        transposed = name in self._transposed
        self._require_shape(a, name, (experts, inputs, outputs) if transposed else (experts, outputs, inputs), shape)
        r = stacked // experts
        terms = []
        for expert in range(experts):
            left = View(self._stored(b), (stacked, experts), expert)
            right = View(self._stored(a), (inputs, 1), expert * r * inputs)
            if transposed:
                left, right = _transpose(right), _transpose(left)
            terms.append(LowRank(left, right, r, self._scale(name), (expert * rows, (expert + 1) * rows)))
        return Change(tuple(terms))

    def _scale(self, module: str) -> float:
        return self._weight * self.adapter.scale_of(module)

    def _tokens(self, module: str) -> tuple[int, ...]:
        """The rows that are trained, in the order of their tensor."""
        indices = self.adapter.config.get("trainable_token_indices")
        if isinstance(indices, Mapping):
            indices = next((rows for name, rows in indices.items() if f".{module}".endswith(f".{name}")), None)
        if not indices:
            raise AdapterError(f"{self.adapter.path}: trainable_token_indices says nothing of {module}")
        return tuple(indices)

    def _shapes(self, a: str, b: str) -> tuple[tuple[int, int], tuple[int, int]]:
        one, two = self.adapter.tensors[a], self.adapter.tensors[b]
        if len(one) != 2 or len(two) != 2:
            raise AdapterError(f"{self.adapter.path}: {a} and {b} have shapes {one} and {two}, expected two dimensions")
        return (one[0], one[1]), (two[0], two[1])

    def _require_rank(self, module: str, r: int, b_rank: int) -> None:
        expected = self.adapter.rank_of(module)
        if not r == b_rank == expected:
            raise AdapterError(
                f"{self.adapter.path}: the factors of {module} have ranks {r} and {b_rank}, expected {expected}"
            )

    def _require_shape(
        self, key: str, name: str, shape: tuple[int, ...], expected: tuple[int, ...] | None = None
    ) -> None:
        expected = expected or self.base.weights.get(name) or self.base.weights.get(self.input or "")
        if shape != expected:
            resized = name in (self.input, _HEAD)
            hint = " (if its vocabulary was resized, resize and save that of the base first)" if resized else ""
            raise AdapterError(
                f"{self.adapter.path}: {key} changes {name} of shape {shape}; "
                f"in the base {self.base.directory} it is {expected}{hint}"
            )

    def _require_same(self, key: str, name: str) -> None:
        """Refuse a copy of a base's weight that is not the base's: its change would be that of another one."""
        from qpack.adapters.copies import is_copy

        name = name if name in self.base.weights else self.input or name
        if name in self.base.packed or not is_copy(self.adapter.weights_path, key, self.base, name):
            raise AdapterError(f"{self.adapter.path}: {key} is not {name} of the base {self.base.directory}")

    def _stored(self, key: str) -> Stored:
        return Stored(self.adapter.weights_path, key)


def _untie(reader: _Reader, found: dict[str, AnyChange]) -> Changes:
    """Give a tied output embedding its own weights where it does not change as the input embedding does."""
    if not reader.tied or reader.input is None or (reader.input not in found and _HEAD not in found):
        return Changes(found, untied=False)
    if reader.adapter.config.get("ensure_weight_tying") or isinstance(found.get(reader.input), ReplaceRows):
        found.pop(_HEAD, None)  # PEFT trains one set of weights for both
        return Changes(found, untied=False)
    if _HEAD not in found and _HEAD not in reader.base.weights:
        found[_HEAD] = Change((), of=reader.input)
    return Changes(found, untied=True)


def _transpose(view: View) -> View:
    return View(view.tensor, view.strides[::-1], view.offset)
