"""The largest singular value of the vectors of a query and a candidate (PMRL, arXiv 2507.17343).

1 where all are orthogonal, sqrt(k) where all k are equal. It is the root of the largest eigenvalue of the k x k Gram
matrix; squaring costs no digits here, because that eigenvalue is at least 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pretrain.scoring.score import Factors, Score, num_rows_at_once
from pretrain.scoring.side import Tuples


def _with_products(tuples: Tuples) -> Factors:
    return {"units": tuples.units, "gram": tuples.units @ tuples.units.mT}


def _leading_values(query: Factors, candidates: Factors) -> Float[Tensor, "r c"]:
    rows, columns = query["units"], candidates["units"]
    num, num_all = rows.shape[1], rows.shape[1] + columns.shape[1]
    found = rows.new_empty(len(rows), len(columns))
    at_once = num_rows_at_once(len(columns), num_all**2)
    parts = zip(rows.split(at_once), query["gram"].split(at_once), found.split(at_once), strict=True)
    for some, gram, target in parts:
        gram_of_pairs = rows.new_zeros(len(some), len(columns), num_all, num_all)  # of which the lower half is read
        gram_of_pairs[:, :, :num, :num] = gram[:, None]
        gram_of_pairs[:, :, num:, num:] = candidates["gram"]
        gram_of_pairs[:, :, num:, :num] = torch.einsum("rmd,cnd->rcnm", some, columns)
        target.copy_(torch.linalg.eigvalsh(gram_of_pairs)[:, :, -1].clamp_(min=0).sqrt_())
    return found


SINGULAR_VALUE = Score(name="singular_value", prepare=_with_products, tile=_leading_values)
