"""A merged checkpoint that is plain: every weight decoded and rounded to one type, without quantization.

Names and shapes are those of the checkpoint that is merged onto. Packed weights that 16-bit checkpoints of the family
hold transposed (GPT-2) are written so. Refused are the experts of a packed gpt-oss, which 16-bit checkpoints hold in
one tensor a layer, and MXFP4, which has two tensors in the place of one.
"""

from collections.abc import Collection

from qpack.checkpoint import Checkpoint
from qpack.errors import CheckpointError
from qpack.manifest import MANIFEST_NAME, Manifest
from qpack.policy.encoded import FLOATS, read_sources
from qpack.policy.modules import transposed_weights
from qpack.policy.plan import Part, Recipe
from qpack.policy.skipping import EXPERT


def transposed(checkpoint: Checkpoint) -> frozenset[str]:
    """The weights that 16-bit checkpoints of the model hold as (in_features, out_features).

    Raises:
        CheckpointError: if they hold in one tensor what ``checkpoint`` has packed one by one.
    """
    recorded = (checkpoint.directory / MANIFEST_NAME).is_file()
    found = Manifest.read(checkpoint.directory).transposed if recorded else transposed_weights(checkpoint)
    for name in found:
        if name in checkpoint.packed and EXPERT.fullmatch(name.rpartition(".")[0]):
            raise CheckpointError(
                f"{checkpoint.directory}: {name} is of one expert, but 16-bit checkpoints of "
                f"{checkpoint.config.get('model_type')} have all of a layer in one tensor; "
                "merge onto the original instead, in 16 bits (--onto original --source SRC)"
            )
    return frozenset(found)


def recipes(checkpoint: Checkpoint, turned: Collection[str], dtype: str) -> list[Recipe]:
    """Every tensor as a plain checkpoint has it: packed and encoded weights decoded, floats in ``dtype``.

    Packed weights among ``turned`` are written transposed. What a 16-bit model has in F32 stays so: its router's
    correction bias, for one.

    Raises:
        CheckpointError: for MXFP4.
    """
    half = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype")) in ("bfloat16", "float16")
    sources = {} if checkpoint.packed else {source.stored: source for source in read_sources(checkpoint)}
    made = []
    for name, shape in checkpoint.weights.items():
        source = sources.get(name)
        if sources and source is None:
            continue  # it only decodes another
        if source and source.name != name:
            raise CheckpointError(f"{checkpoint.directory}: {name} is MXFP4, which is not merged onto")
        scale, block = (source.scale, source.block) if source else (None, None)
        if name in checkpoint.packed:
            turn = name in turned
            part = Part(name, shape[::-1] if turn else shape, dtype=dtype, transpose=turn)
        else:
            stored = checkpoint.tensors[name].dtype
            cast = scale is not None or (stored in FLOATS and not (half and stored == "F32"))
            part = Part(name, shape, dtype=dtype if cast else None)
        made.append(Recipe(name, (part,), scale, block))
    return made
