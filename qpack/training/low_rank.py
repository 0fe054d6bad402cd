"""The best approximation of a matrix by one of small rank, without its whole singular value decomposition.

::

    K = [M G, (M M^T) M G, ..., (M M^T)^(q-1) M G]    G random, (columns, r + spare)
    M ~ Q (Q^T M)                                      Q an orthonormal basis of K

The r largest singular values of the small ``Q^T M`` are nearly those of M: block Krylov iteration (Musco and Musco,
arXiv 1504.05477, algorithm 2). It suits what packing loses, whose singular values fall slowly: plain subspace iteration
would want several times as many products. Of a small matrix the decomposition is taken as it is.
"""

import torch

_SPARE = 8
"""Columns beside the r that are asked for."""

_BLOCKS = 8
"""q. Of a weight's error at r = 16 the residual is then within 1e-4 of the best (tests/training/test_from_error.py)."""


def largest_singular(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The r largest singular values and their vectors: U (rows, r), S (r,), V^T (r, columns).

    The same matrix gives the same result on the same device; the global random numbers are left alone.
    """
    rows, columns = matrix.shape
    width = r + _SPARE
    basis = torch.eye(rows, device=matrix.device, dtype=matrix.dtype)
    if width * _BLOCKS < min(rows, columns):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(columns, width, generator=generator, dtype=matrix.dtype).to(matrix.device)
        basis = _krylov(matrix, start)
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u[:, :r], s[:r], vh[:r]


def _krylov(matrix: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of K, (rows, q * width)."""
    block = matrix @ start
    basis = matrix.new_empty(len(matrix), 0)
    for _ in range(_BLOCKS):
        for _ in range(2):  # once leaves what rounding has left
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        basis = torch.cat((basis, block), dim=1)
        block = matrix @ (matrix.T @ block)
    return basis
