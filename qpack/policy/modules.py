"""Which weights of a model are packed, how, and why every other tensor is not: the policy behind a plan.

Packed are the weights of every Linear of a language model, routed experts included (one weight an expert, also where
the source holds all experts of a layer in one tensor), except the output embedding, routers, and other towers than the
text's. `families` knows the well-known models by names, `structure` asks transformers for all others.

Weights that an engine fuses (q, k and v; gate and up; the experts of a layer) are packed or kept together: vLLM would
quantize the rest of a half-packed module while loading. Its plugin also wants all experts of a layer packed alike.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qpack.checkpoint import CONFIG_NAME, Checkpoint
from qpack.errors import CheckpointError
from qpack.policy import families, structure
from qpack.policy.encoded import FLOATS, Source, read_sources
from qpack.policy.families import OUTPUT_EMBEDDING as OUTPUT_EMBEDDING
from qpack.policy.plan import Packing, Part, Recipe
from qpack.policy.roles import OUTPUT, ROUTER, TOWERS, Anatomy, Experts, Kept, Linear, Role, is_transposed, why_kept
from qpack.policy.rules import DTYPES, Rules
from qpack.policy.skipping import EXPERT, fused_module, skip_modules, towers


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be written, and what loaders must be told about it."""

    recipes: tuple[Recipe, ...]
    """One for each tensor of the source, in the order of files and bytes; none for those that only decode others."""
    skip_modules: tuple[str, ...]
    """``llm_int8_skip_modules`` of the quantization config."""
    foreign: tuple[str, ...]
    """What of the packed weights transformers' own loader cannot read, in words; empty if it reads all."""

    transposed: tuple[str, ...]
    """The packed weights that 16-bit checkpoints of the model have as (in_features, out_features): those of GPT-2's
    Conv1D, and of gpt-oss's experts, all of a layer in one tensor there."""

    @property
    def packed(self) -> dict[str, tuple[int, ...]]:
        """Name and shape (out_features, in_features) of every packed weight."""
        return {part.name: part.shape for recipe in self.recipes for part in recipe.parts if part.packing is not None}

    @property
    def kept(self) -> dict[str, str]:
        """Why every other tensor is kept, by name."""
        return {part.name: part.reason for recipe in self.recipes for part in recipe.parts if part.packing is None}


@dataclass(frozen=True, slots=True)
class _Draft:
    """A part on its way into a plan."""

    part: Part
    source: Source
    role: Role | None

    @property
    def group(self) -> str:
        """vLLM's name of the module that holds the part."""
        return fused_module(self.part.name.rpartition(".")[0])


def plan(
    checkpoint: Checkpoint,
    *,
    packing: Packing,
    rules: Rules | None = None,
    pack_lm_head: bool = False,
    chosen: Mapping[str, Packing | None] | None = None,
) -> Plan:
    """Plan how to store every tensor of ``checkpoint``: weights as ``packing`` says, unless ``rules`` differ.

    ``pack_lm_head`` also packs the output embedding, which vLLM cannot load. ``chosen`` gives groups of weights (by the
    names from `groups`) other settings than ``packing``, None to keep them, which routed experts (``.experts``) cannot
    be; rules go before it.

    Raises:
        CheckpointError: for a model that is quantized already otherwise than `encoded` reads, that transformers
            does not know, that lacks weights, or whose output embedding is tied and to be packed.
        DataError: naming the rule that does nothing, cannot be followed, or would split a fused module.
        ValueError: if ``chosen`` keeps routed experts.
    """
    config_path = checkpoint.directory / CONFIG_NAME
    sources = read_sources(checkpoint)
    shapes = {source.name: source.shape for source in sources}
    anatomy = _anatomy(checkpoint, shapes)
    if pack_lm_head and (anatomy.tied or anatomy.output in anatomy.unstored):
        raise CheckpointError(
            f"{config_path}: the output embedding is tied to the input embedding, so it is not packed"
        )
    _check_experts(checkpoint, anatomy)
    decoded = _decoded_dtype(checkpoint.config)
    drafts = [draft for source in sources for draft in _drafts(source, anatomy)]
    drafts = [_decide(draft, packing, pack_lm_head, chosen or {}) for draft in drafts]
    if rules is not None:
        drafts = _follow(rules, drafts, packing, anatomy)
        _check_groups(rules, drafts)
    _check_stored(checkpoint, drafts)
    parts: dict[str, list[Part]] = {source.stored: [] for source in sources}
    for draft in drafts:
        parts[draft.source.stored].append(_in_a_float(draft, decoded))
    return Plan(
        recipes=tuple(Recipe(one.stored, tuple(parts[one.stored]), one.scale, one.block) for one in sources),
        skip_modules=_skipped(config_path, drafts, anatomy),
        foreign=tuple(sorted({what for draft in drafts if (what := _foreign(draft))})),
        transposed=tuple(draft.part.name for draft in drafts if draft.part.packing and is_transposed(draft.role)),
    )


def transposed_weights(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What `Plan.transposed` would be of a checkpoint that is packed, or 16-bit, told from the model alone.

    Raises:
        CheckpointError: for a model that transformers does not know, or that lacks weights.
    """
    roles = read_roles(checkpoint)
    experts = {name for name in checkpoint.packed if name not in roles and EXPERT.fullmatch(name.rpartition(".")[0])}
    return tuple(name for name in checkpoint.weights if name in experts or is_transposed(roles.get(name)))


def read_roles(checkpoint: Checkpoint) -> Mapping[str, Role]:
    """The roles of the tensors of a checkpoint that is packed, or 16-bit, by their names.

    Raises:
        CheckpointError: as `transposed_weights`.
    """
    return _anatomy(checkpoint, checkpoint.weights).roles


def _anatomy(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Anatomy:
    found = families.read_anatomy(checkpoint.config, shapes)
    return found or structure.read_anatomy(checkpoint.directory / CONFIG_NAME, checkpoint.config, shapes)


def groups(planned: Plan) -> dict[str, tuple[str, ...]]:
    """The packed weights that must be stored alike, by the name of the module that an engine fuses them into."""
    found: dict[str, list[str]] = {}
    for name in planned.packed:
        found.setdefault(fused_module(name.rpartition(".")[0]), []).append(name)
    return {group: tuple(names) for group, names in found.items()}


def _drafts(source: Source, anatomy: Anatomy) -> Iterator[_Draft]:
    """The parts that ``source`` is written as: with a reason those that are kept, without one those to be packed."""
    role = anatomy.roles.get(source.name)
    if isinstance(role, Experts) and role.outputs:
        yield from _expert_drafts(source, role)
        return
    if role is None:
        reason = why_kept(source.name, source.shape)
    else:
        reason = role.reason if isinstance(role, Kept) else role.keep
    yield _Draft(Part(anatomy.names.get(source.name, source.name), source.shape, reason=reason), source, role)


def _expert_drafts(source: Source, role: Experts) -> Iterator[_Draft]:
    """The parts of a tensor of all experts: weights (experts, ., .) or biases (experts, out_features)."""
    transpose = role.transpose and source.scale is None  # MXFP4's matrices are (out_features, in_features)
    experts, *matrix = source.shape
    if transpose:
        matrix.reverse()
    count = len(role.outputs)
    rows = matrix[0] // count
    for expert in range(experts):
        for index, output in enumerate(role.outputs):
            part = Part(
                name=output.replace("*", str(expert)),
                shape=(rows, *matrix[1:]),
                matrix=expert,
                rows=(index, count) if role.interleaved else (index * rows, 1),
                transpose=transpose,
                reason=role.keep,
            )
            yield _Draft(part, source, role)


def _decide(draft: _Draft, packing: Packing, pack_lm_head: bool, chosen: Mapping[str, Packing | None]) -> _Draft:
    """``draft`` as it is stored where no rule differs."""
    if draft.part.reason == OUTPUT and pack_lm_head:
        return _pack(draft, packing)
    if draft.part.reason:
        return draft
    settings = chosen.get(draft.group, packing)
    if settings is not None:
        return _pack(draft, settings)
    if isinstance(draft.role, Experts):
        raise ValueError(f"{draft.group} is chosen to be kept, but vLLM reads routed experts in 4 bits only")
    return _keep(draft, "target bits")


def _pack(draft: _Draft, packing: Packing) -> _Draft:
    part = replace(draft.part, packing=packing, dtype=None, reason="")
    if isinstance(draft.role, Linear) and draft.role.transpose and not part.transpose:
        part = replace(part, shape=part.shape[::-1], transpose=True)
    return replace(draft, part=part)


def _keep(draft: _Draft, reason: str) -> _Draft:
    part = replace(draft.part, packing=None, reason=reason)
    if isinstance(draft.role, Linear):
        part = replace(part, shape=draft.source.shape, transpose=False)
    return replace(draft, part=part)


def _follow(rules: Rules, drafts: list[_Draft], packing: Packing, anatomy: Anatomy) -> list[_Draft]:
    """``drafts`` with what ``rules`` say; every rule must change one at least."""
    matched, effective, result = set(), set(), []
    for draft in drafts:
        index = rules.first(draft.part.name)
        if index is not None:
            matched.add(index)
            changed = _apply(rules, index, draft, packing, anatomy)
            if changed is not None:
                effective.add(index)
                draft = changed
        result.append(draft)
    for index, rule in enumerate(rules.rules):
        if index in effective:
            continue
        if index in matched:
            raise rules.error(index, "changes nothing of what it matches")
        if any(rule.matches(draft.part.name) for draft in drafts):
            raise rules.error(index, "matches only what rules before it decide")
        raise rules.error(index, "matches no tensor")
    return result


def _apply(rules: Rules, index: int, draft: _Draft, packing: Packing, anatomy: Anatomy) -> _Draft | None:
    """``draft`` with what a rule that matches it says; None if that does not concern it."""
    rule = rules.rules[index]
    if draft.part.packing is not None and rule.keep:
        if isinstance(draft.role, Experts) and draft.role.transpose:
            raise rules.error(index, f"keeps {draft.part.name}, an expert that is read in 4 bits only")
        kept = _keep(draft, f"rule keep: {rule.match}")
        return _retype(kept, rule.dtype) or kept
    if draft.part.packing is None and not rule.pack:
        return _retype(draft, rule.dtype)
    if draft.part.packing is None:
        if problem := _unpackable(draft, anatomy):
            raise rules.error(index, f"packs {draft.part.name}, which is {problem}")
        draft = _pack(draft, packing)
    elif not rule.pack and rule.blocksize is None and rule.double_quant is None:
        return None
    old = draft.part.packing or packing
    blocksize = old.blocksize if rule.blocksize is None else rule.blocksize
    double_quant = old.double_quant if rule.double_quant is None else rule.double_quant
    return _pack(draft, Packing(blocksize, double_quant))


def _retype(draft: _Draft, dtype: str | None) -> _Draft | None:
    """A kept part in another float type; None if none is asked for or it is not of floats."""
    if dtype is None or (draft.source.dtype not in FLOATS and draft.source.scale is None):
        return None
    return replace(draft, part=replace(draft.part, dtype=dtype))


def _unpackable(draft: _Draft, anatomy: Anatomy) -> str:
    """Why a kept part cannot be packed by a rule; empty if it can."""
    reason = draft.part.reason
    if reason.startswith("tied") or (reason == OUTPUT and anatomy.tied):
        return "tied to another weight"
    packable = isinstance(draft.role, Linear) or (isinstance(draft.role, Experts) and reason != "bias")
    return "" if packable else reason


def _in_a_float(draft: _Draft, decoded: str) -> Part:
    """The part, with ``decoded`` for a type where it is encoded and kept."""
    part = draft.part
    if part.packing is None and part.dtype is None and draft.source.scale is not None:
        return replace(part, dtype=decoded)
    return part


def _decoded_dtype(config: Mapping[str, Any]) -> str:
    """The type that encoded weights are decoded to: that of the model, as config.json has it."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if section.get(key) in DTYPES:
                return str(section[key])
    return "bfloat16"


def _check_stored(checkpoint: Checkpoint, drafts: list[_Draft]) -> None:
    """Refuse a model without any weight to pack, outputs of one name, and weights that cannot be packed."""
    packed = [draft for draft in drafts if draft.part.packing is not None]
    if not packed:
        raise CheckpointError(f"{checkpoint.directory}: no weight to pack")
    names = Counter(draft.part.name for draft in drafts)
    twice, count = names.most_common(1)[0]
    if count > 1:
        raise CheckpointError(
            f"{checkpoint.directory}: {twice} is stored twice, by itself and in one tensor of experts"
        )
    for draft in packed:
        source = draft.source
        if source.scale is None and source.dtype not in FLOATS:
            expected = ", ".join(sorted(FLOATS))
            raise CheckpointError(f"{checkpoint.directory}: {source.stored} is {source.dtype}, expected {expected}")
        if len(draft.part.shape) != 2:
            found = f"has shape {source.shape}, expected (out_features, in_features)"
            raise CheckpointError(f"{checkpoint.directory}: {source.stored} {found}")


def _check_experts(checkpoint: Checkpoint, anatomy: Anatomy) -> None:
    """Refuse layers that lack experts."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for name, role in anatomy.roles.items():
        if isinstance(role, Experts) and not role.outputs:
            before, number, leaf = name.removesuffix(".weight").rsplit(".", 2)
            numbers.setdefault((before, leaf), set()).add(int(number))
    largest: dict[str, int] = {}
    for (before, _), found in numbers.items():
        largest[before] = max(largest.get(before, 0), max(found))
    for (before, leaf), found in numbers.items():
        lacking = set(range(largest[before] + 1)) - found
        if lacking:
            raise CheckpointError(f"{checkpoint.directory}: no tensor {before}.{min(lacking)}.{leaf}.weight")


def _check_groups(rules: Rules, drafts: list[_Draft]) -> None:
    """Refuse rules that pack a part of a fused module, or experts of a layer in different ways."""
    first: dict[str, _Draft] = {}
    for draft in drafts:
        if not isinstance(draft.role, Linear | Experts):
            continue
        if draft.part.packing is None and draft.part.reason == draft.role.keep:
            continue  # not for packing in the first place
        other = first.setdefault(draft.group, draft)
        one, two = other.part, draft.part
        split = (one.packing is None) != (two.packing is None)
        if split or (isinstance(draft.role, Experts) and one.packing != two.packing):
            deciding = (rules.first(part.name) for part in (two, one))
            message = f"stores {two.name} otherwise than {one.name}, with which vLLM fuses it into {draft.group}"
            raise rules.error(next(index for index in deciding if index is not None), message)


def _foreign(draft: _Draft) -> str:
    """What transformers' own loader cannot read of a part, if it is packed."""
    if draft.part.packing is None:
        return ""
    if isinstance(draft.role, Experts):
        return "routed experts"
    return draft.role.foreign if isinstance(draft.role, Linear) else ""


def _skipped(config_path: Path, drafts: list[_Draft], anatomy: Anatomy) -> tuple[str, ...]:
    """The list for what is kept: Linear modules and routers by all their names, experts and other towers as a whole."""
    packed = [draft for draft in drafts if draft.part.packing is not None]
    kept = [draft for draft in drafts if draft.part.packing is None]
    linears = {name for draft in kept if isinstance(draft.role, Linear) for name in _modules(draft)} | anatomy.unstored
    apart = [draft for draft in kept if isinstance(draft.role, Experts) and not draft.role.keep]
    experts = {name for draft in apart for name in _modules(draft)}
    routers = {name for draft in kept if draft.part.reason == ROUTER for name in _modules(draft)}
    outside = {name for draft in kept if draft.part.reason in TOWERS for name in _modules(draft)}
    inside = {name for draft in packed for name in _modules(draft)}
    wanted = (linears | experts | routers) - outside | towers(outside, inside)
    replaced = [draft.role.module for draft in packed if isinstance(draft.role, Linear)]
    entries, clashes = skip_modules(wanted, replaced)
    for entry, module in clashes:
        if entry in linears:
            found = f"{entry} cannot be kept while {module} is packed: transformers skips all that starts so"
            raise CheckpointError(f"{config_path}: {found}")
    return tuple(entries)


def _modules(draft: _Draft) -> set[str]:
    """The names of the module of a part, of all experts for one: transformers', and the one that it is stored under."""
    stored = draft.group if isinstance(draft.role, Experts) else draft.part.name.rpartition(".")[0]
    return {stored} if draft.role is None else {stored, draft.role.module}
