"""The largest eigenvalue of very many very small symmetric matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_SWEEPS = 30  # 4 to 6 are the rule: convergence is quadratic


def leading_eigenvalue(matrices: Sequence[Sequence[Tensor]]) -> Tensor:
    """By Jacobi's rotations, each of which is a few operations on all matrices at once.

    Exact to rounding where eigenvalues are equal, too (a closed form for 3 x 3 is not). LAPACK in a loop is slower for
    up to 4 x 4, and cuSOLVER refuses more than about 32,000 matrices at once (github.com/mujocolab/mjlab/pull/732).

    Args:
        matrices: entry (i, j) of all of them in `matrices[i][j]`, j <= i; shapes that broadcast. Finite.
    """
    entries = [list(row) for row in matrices]
    num = len(entries)
    for _ in range(MAX_SWEEPS):
        scale = max(float(entries[i][i].abs().max()) for i in range(num))
        off_diagonal = max((float(entries[i][j].abs().max()) for i in range(num) for j in range(i)), default=0.0)
        if off_diagonal <= torch.finfo(entries[0][0].dtype).eps * scale:
            break
        for q in range(1, num):
            for p in range(q):
                _rotate(entries, p, q)
    diagonal = torch.broadcast_tensors(*(entries[i][i] for i in range(num)))
    return torch.stack(diagonal).amax(dim=0)


def _rotate(entries: list[list[Tensor]], p: int, q: int) -> None:
    """Turn axes p < q so that entry (q, p) becomes 0: tan is the smaller root of t^2 + t (a_qq - a_pp) / a_qp = 1."""
    cross = entries[q][p]
    difference = entries[q][q] - entries[p][p]
    root = (difference.square() + (2 * cross).square()).sqrt()
    divisor = difference + torch.copysign(root, difference)
    tangent = 2 * cross / divisor.masked_fill(divisor == 0, 1)  # there cross is 0, too
    cosine = (1 + tangent.square()).rsqrt()
    sine = tangent * cosine
    entries[p][p] = entries[p][p] - tangent * cross
    entries[q][q] = entries[q][q] + tangent * cross
    entries[q][p] = torch.zeros_like(cross)
    for i in range(len(entries)):
        if i in (p, q):
            continue
        (a, b), (c, d) = (max(i, p), min(i, p)), (max(i, q), min(i, q))
        one, other = entries[a][b], entries[c][d]
        entries[a][b] = cosine * one - sine * other
        entries[c][d] = sine * one + cosine * other
