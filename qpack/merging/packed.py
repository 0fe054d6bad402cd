"""A merged checkpoint that is packed: `qpack.convert`'s plan for weights that change on the way, and ``qpack.json``.

What is packed is the sum of the original's weight and the change, in f64 rounded to f32: the codes are those that
`qpack.convert` makes of the same merge written in float32. Types stay those of the original, also where an adapter has
a tensor of its own in another.
"""

import hashlib
import json
from dataclasses import asdict, replace

from qpack import _core
from qpack.adapters.changes import Replace
from qpack.adapters.combining import Combination, Weighted
from qpack.adapters.trained import Changes, input_embedding
from qpack.checkpoint import Checkpoint
from qpack.manifest import Manifest
from qpack.packing import TORCH_DTYPES, ConvertOptions, PackingJob
from qpack.policy.plan import Part, Recipe
from qpack.policy.roles import OUTPUT
from qpack.sources import Source


def prepare_packing(onto: Checkpoint, options: ConvertOptions) -> PackingJob:
    """How ``onto`` is to be packed, changed or not.

    Raises:
        CheckpointError, DataError: as `PackingJob.prepare`.
    """
    return PackingJob.prepare(Source(str(onto.directory), None, onto, onto.directory), options)


def with_changes(job: PackingJob, changes: Changes) -> PackingJob:
    """``job`` for weights that ``changes`` change; an output embedding that was tied is kept."""
    onto = job.source.checkpoint
    recipes = [
        _of_type(recipe, _dtype(onto, recipe)) if isinstance(changes.by_weight.get(recipe.source), Replace) else recipe
        for recipe in job.plan.recipes
    ]
    recipes += [untied(onto, name) for name in changes.by_weight.keys() - onto.weights.keys()]
    return replace(job, plan=replace(job.plan, recipes=tuple(recipes)))


def untied(onto: Checkpoint, name: str, dtype: str | None = None) -> Recipe:
    """The recipe of an output embedding that ``onto`` ties to the input embedding, in the type of that or ``dtype``."""
    of = input_embedding(onto)
    assert of is not None  # else nothing is tied
    part = Part(name, onto.weights[of], dtype=dtype or TORCH_DTYPES[onto.tensors[of].dtype], reason=OUTPUT)
    return Recipe(name, (part,))


def record(job: PackingJob, written: _core.Written, adapters: Weighted, combination: Combination) -> Manifest:
    """``qpack.json`` of what was ``written``.

    No checkpoint holds what was packed; its digest is SHA-256 over what it was made of.
    """
    made = [
        {"name": adapter.path.resolve().name, "fingerprint": adapter.fingerprint(), "weight": weight}
        for adapter, weight in adapters
    ]
    parts = {"original": written.source_fingerprint, "adapters": made, "combination": asdict(combination)}
    text = json.dumps(parts, sort_keys=True)
    return job.manifest(written, digest=hashlib.sha256(text.encode()).hexdigest(), adapters=made)


def _dtype(onto: Checkpoint, recipe: Recipe) -> str:
    return "bfloat16" if recipe.scale else TORCH_DTYPES[onto.tensors[recipe.source].dtype]


def _of_type(recipe: Recipe, dtype: str) -> Recipe:
    return replace(recipe, parts=tuple(replace(part, dtype=part.dtype or dtype) for part in recipe.parts))
