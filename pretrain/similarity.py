"""Scores of queries against candidates where any row may be missing (NaN or all zero)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from data_pipeline.settings import UserError, nearest
from pretrain.retrieval import summed_cosine_scores, volume_scores

SCORES = ("volume", "cosine")
BLOCK_ELEMENTS = 1 << 22  # of the largest intermediate: 32 MB of float64

Vectors = Mapping[str, Float[Tensor, "samples dim"]]
Queries = Mapping[str, Float[Tensor, "q dim"]]
Candidates = Mapping[str, Float[Tensor, "c dim"]]


def similarity(query: Queries, candidates: Candidates, score: str) -> Float[Tensor, "q c"]:
    """Scores in float64, higher is better; -inf where the query or the candidate has nothing at all.

    volume: minus the volume that the vectors of both sides span together. A missing vector counts as orthogonal to
    all others (factor 1), so it is never an advantage. cosine: the sum of the cosines of every vector of the query
    with every vector of the candidate; a missing vector adds 0. For complete rows these are the scores of
    `pretrain.retrieval`.

    Raises:
        UserError: an unknown score, no modality on a side, rows of different shapes, or fewer dimensions than vectors.
    """
    if score not in SCORES:
        raise UserError(f"score '{score}': unknown; {nearest(score, SCORES)}")
    dims = [_shape("query", query)[1], _shape("candidates", candidates)[1]]
    if dims[0] != dims[1]:
        raise UserError(f"query rows have {dims[0]} dimensions, candidates {dims[1]}: expected the same model's")
    if score == "volume" and len(query) + len(candidates) > dims[0]:
        raise UserError(f"{len(query) + len(candidates)} vectors in {dims[0]} dimensions: every volume would be 0")
    rows, columns = _present(query), _present(candidates)
    query, candidates = _zeros_where_missing(query, rows), _zeros_where_missing(candidates, columns)
    if score == "cosine":
        scores = torch.stack([summed_cosine_scores(side, candidates) for side in query.values()]).sum(dim=0)
    else:
        scores = _volume_scores(query, rows, candidates, columns)
    scores[~rows.any(dim=1)] = -torch.inf
    scores[:, ~columns.any(dim=1)] = -torch.inf
    return scores


def _shape(side: str, vectors: Vectors) -> tuple[int, int]:
    if not vectors:
        raise UserError(f"{side}: no modality; expected rows of at least one")
    shapes = {name: tuple(rows.shape) for name, rows in vectors.items()}
    first = next(iter(shapes.values()))
    if len(set(shapes.values())) > 1 or len(first) != 2:
        raise UserError(f"{side}: shapes {shapes}; expected [n, D], the same for every modality")
    return first[0], first[1]


def _present(vectors: Vectors) -> Bool[Tensor, "samples modalities"]:
    found = [(rows != 0).any(dim=1) & ~rows.isnan().any(dim=1) for rows in vectors.values()]
    return torch.stack(found, dim=1)


def _zeros_where_missing(vectors: Vectors, present: Bool[Tensor, "samples modalities"]) -> dict[str, Tensor]:
    return {
        name: torch.where(present[:, [place]], rows, torch.zeros_like(rows))
        for place, (name, rows) in enumerate(vectors.items())
    }


def _volume_scores(query: Queries, rows: Tensor, candidates: Candidates, columns: Tensor) -> Float[Tensor, "q c"]:
    """Blocks of queries and candidates that have the same modalities."""
    scores = torch.full((len(rows), len(columns)), -torch.inf, dtype=torch.float64, device=rows.device)
    for some, one_side in _patterns(query, rows):
        for others, other_side in _patterns(candidates, columns):
            if len(one_side) == 1:
                block = volume_scores(next(iter(one_side.values())), other_side)
            elif len(other_side) == 1:
                block = volume_scores(next(iter(other_side.values())), one_side).T
            else:
                block = _joint_volume_scores(one_side, other_side)
            scores[some[:, None], others] = block
    return scores


def _patterns(vectors: Vectors, present: Tensor) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Row numbers and vectors of the samples that have the same modalities, for each set of modalities that occurs."""
    for pattern in present.unique(dim=0) if len(present) else present:
        chosen = (present == pattern).all(dim=1).nonzero()[:, 0]
        if pattern.any():
            there = zip(vectors.items(), pattern.tolist(), strict=True)
            yield chosen, {name: rows[chosen] for (name, rows), has in there if has}


def _joint_volume_scores(query: Queries, candidates: Candidates) -> Float[Tensor, "q c"]:
    """Minus Vol(query) Vol(candidate) sqrt(det(I - M M^T)), M the product of the two orthonormal bases."""
    one, volume_of_one = _basis(query)
    other, volume_of_other = _basis(candidates)
    identity = torch.eye(one.shape[2], dtype=one.dtype, device=one.device)
    block = max(1, BLOCK_ELEMENTS // max(1, len(other) * other.shape[2] * one.shape[2]))
    parts = [one.new_zeros(0, len(other))]
    for some in one.split(block):
        products = torch.einsum("qdm,cdn->qcmn", some, other)
        parts.append(torch.linalg.det(identity - products @ products.mT).clamp(min=0).sqrt())
    return -torch.cat(parts) * volume_of_one[:, None] * volume_of_other


def _basis(vectors: Vectors) -> tuple[Float[Tensor, "n dim k"], Float[Tensor, " n"]]:
    stacked = torch.stack([F.normalize(rows.double(), dim=1) for rows in vectors.values()], dim=2)
    q, r = torch.linalg.qr(stacked)
    return q, r.diagonal(dim1=1, dim2=2).prod(dim=1).abs()
