"""A plan carried out by torch and bitsandbytes, whole tensors at a time: what it means, and an oracle for Rust."""

from collections.abc import Mapping

import bitsandbytes.functional as bnb
import torch

from qpack.modules import Plan
from qpack.plan import Part


def select(source: torch.Tensor, part: Part) -> torch.Tensor:
    """The elements of the decoded ``source`` that ``part`` is made of, in its shape."""
    if source.ndim < len(part.shape) or (not part.transpose and tuple(source.shape) == part.shape):
        return source
    matrix = source.reshape(-1, *source.shape[source.ndim - len(part.shape) :])[part.matrix]
    if part.transpose:
        matrix = matrix.T
    first, step = part.rows
    return matrix[first::step][: part.shape[0]].contiguous()


def carry_out(
    plan: Plan, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors to store, and those of the source with packed ones as they decode; for sources of plain floats."""
    stored, decoded = {}, dict(tensors)
    for recipe in plan.recipes:
        for part in recipe.parts:
            value = select(tensors[recipe.source], part)
            if part.packing is None:
                stored[part.name] = value.to(getattr(torch, part.dtype)) if part.dtype else value
                continue
            codes, state = bnb.quantize_4bit(
                value,
                blocksize=part.packing.blocksize,
                compress_statistics=part.packing.double_quant,
                quant_type="nf4",
            )
            stored[part.name] = codes
            stored |= {f"{part.name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
            weight = bnb.dequantize_4bit(codes, state)
            decoded[recipe.source] = weight.T.contiguous() if part.transpose else weight
    return stored, decoded
