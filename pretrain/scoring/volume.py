"""Volumes of the parallelotopes that a query and a candidate span together (GRAM, arXiv 2412.11959).

With orthonormal axes of each side, and M the products of the query's axes with the candidate's,
V = V_query V_candidate sqrt(det(I - M M^T)). With one vector on a side the determinant is 1 - |M|^2, the squared
distance of that vector to the span of the others. There is no eps under the root, which would bias small volumes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pretrain.objectives.gram_schmidt import orthonormal_axes
from pretrain.scoring.score import Factors, Score, num_rows_at_once
from pretrain.scoring.side import Tuples


def _axes(tuples: Tuples) -> Factors:
    """Axes are zeros where a vector is missing, which then takes no part in the product and the determinant."""
    axes, volume = orthonormal_axes(tuples.units.unbind(dim=1), tuples.there.unbind(dim=1))
    return {"axes": torch.stack(axes, dim=1), "volume": volume}


def _minus_volumes(query: Factors, candidates: Factors) -> Float[Tensor, "r c"]:
    rows, columns = query["axes"], candidates["axes"]
    squares = _distances_squared(rows, columns) if 1 in (rows.shape[1], columns.shape[1]) else _angles(rows, columns)
    return squares.clamp_(min=0).sqrt_().mul_(-query["volume"][:, None]).mul_(candidates["volume"])


def _distances_squared(rows: Float[Tensor, "r one dim"], columns: Float[Tensor, "c other dim"]) -> Float[Tensor, "r c"]:
    """1 - |M|^2, a product at a time."""
    squares = rows.new_ones(len(rows), len(columns))
    for axis in rows.unbind(dim=1):
        for other in columns.unbind(dim=1):
            squares -= (axis @ other.T).square_()
    return squares


def _angles(rows: Float[Tensor, "r one dim"], columns: Float[Tensor, "c other dim"]) -> Float[Tensor, "r c"]:
    """det(I - M M^T), or det(I - M^T M), whichever is smaller: a product of squared sines."""
    num_rows, num_columns = rows.shape[1], columns.shape[1]
    identity = torch.eye(min(num_rows, num_columns), dtype=rows.dtype, device=rows.device)
    found = rows.new_empty(len(rows), len(columns))
    at_once = num_rows_at_once(len(columns), num_rows * num_columns)
    for some, target in zip(rows.split(at_once), found.split(at_once), strict=True):
        products = torch.einsum("rmd,cnd->rcmn", some, columns)
        squares = products @ products.mT if num_rows <= num_columns else products.mT @ products
        target.copy_(torch.linalg.det(identity - squares))
    return found


VOLUME = Score(name="volume", prepare=_axes, tile=_minus_volumes, needs_dims=True)
