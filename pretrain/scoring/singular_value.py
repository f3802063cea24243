"""The largest singular value of the vectors of a query and a candidate (PMRL, arXiv 2507.17343).

1 where all are orthogonal, sqrt(k) where all k are equal. It is the root of the largest eigenvalue of the k x k Gram
matrix; squaring costs no digits here, because that eigenvalue is at least 1.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from pretrain.scoring.eigenvalue import leading_eigenvalue
from pretrain.scoring.score import Factors, Score, num_rows_at_once
from pretrain.scoring.side import Tuples


def _with_products(tuples: Tuples) -> Factors:
    return {"units": tuples.units, "gram": tuples.units @ tuples.units.mT}


def _leading_values(query: Factors, candidates: Factors) -> Float[Tensor, "r c"]:
    rows, columns = query["units"], candidates["units"]
    found = rows.new_empty(len(rows), len(columns))
    at_once = num_rows_at_once(len(columns), (rows.shape[1] + columns.shape[1]) ** 2)
    parts = zip(rows.split(at_once), query["gram"].split(at_once), found.split(at_once), strict=True)
    for some, gram, target in parts:
        target.copy_(leading_eigenvalue(_gram_of_pairs(some, gram, columns, candidates["gram"])).sqrt_())
    return found


def _gram_of_pairs(rows: Tensor, gram: Tensor, columns: Tensor, other_gram: Tensor) -> list[list[Tensor]]:
    """Entry (i, j), j <= i, of the Gram matrices of all pairs: [r, 1] among queries, [c] among candidates, [r, c]."""
    own = [[gram[:, i, j, None] for j in range(i + 1)] for i in range(rows.shape[1])]
    others = [
        [row @ column.T for row in rows.unbind(dim=1)] + [other_gram[:, i, j] for j in range(i + 1)]
        for i, column in enumerate(columns.unbind(dim=1))
    ]
    return own + others


SINGULAR_VALUE = Score(name="singular_value", prepare=_with_products, tile=_leading_values)
