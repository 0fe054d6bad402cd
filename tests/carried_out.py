"""What a part of a plan means, by torch: an oracle for Rust."""

import torch

from qpack.policy.plan import Part


def select(source: torch.Tensor, part: Part) -> torch.Tensor:
    """The elements of the decoded ``source`` that ``part`` is made of, in its shape."""
    if source.ndim < len(part.shape) or (not part.transpose and tuple(source.shape) == part.shape):
        return source
    matrix = source.reshape(-1, *source.shape[source.ndim - len(part.shape) :])[part.matrix]
    if part.transpose:
        matrix = matrix.T
    first, step = part.rows
    return matrix[first::step][: part.shape[0]].contiguous()
