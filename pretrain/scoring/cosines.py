"""Scores that are one product of a vector of the query and a vector of the candidate."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pretrain.scoring.score import Factors, Score
from pretrain.scoring.side import Tuples


def _sum(tuples: Tuples) -> Factors:
    return {"vector": tuples.units.sum(dim=1)}


def _centroid(tuples: Tuples) -> Factors:
    return {"vector": F.normalize(tuples.units.sum(dim=1), dim=1)}


def _products(query: Factors, candidates: Factors) -> Float[Tensor, "r c"]:
    return query["vector"] @ candidates["vector"].T


COSINE = Score(name="cosine", prepare=_sum, tile=_products, one_vector_a_side=True)
# The dot product with the sum, not normalised: a candidate whose vectors agree with each other scores higher than one
# whose vectors cancel.
SUMMED_COSINE = Score(name="summed_cosine", prepare=_sum, tile=_products)
CENTROID = Score(name="centroid", prepare=_centroid, tile=_products)
