"""The best candidates of each query, without the matrix of all scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from data_pipeline.settings import UserError
from pretrain.scoring.comparison import TILE, Comparison, Side

Excluded = Callable[[slice, slice], Tensor]  # rows, columns -> bool [r, c], on the device of the comparison


@dataclass(frozen=True, kw_only=True)
class Matches:
    """The first candidates of each query, best first; equal scores in the order of the candidates.

    indices: positions of candidates. Where a query has fewer candidates than columns: -1, and a score of -inf.
    """

    scores: Float[Tensor, "q k"]
    indices: Int64[Tensor, "q k"]


@torch.no_grad()
def search(
    query: Side,
    candidates: Side,
    score: str,
    *,
    top_k: int = 10,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
    tile: int = TILE,
) -> Matches:
    """The `top_k` candidates (or all, where there are fewer) that score highest with each query.

    Exactly the first columns of the sorted rows of `scores`, with memory for tiles and results only. A candidate or a
    query without any vector, or with NaN where its mask is true, is never a match. Arguments as of `scores`.

    Raises:
        UserError: `top_k` below 1; else see `Comparison.of`.
    """
    comparison = Comparison.of(query, candidates, score, dtype=dtype, device=device, tile=tile)
    home = next(iter(comparison.query.vectors.values())).device
    return best(comparison, top_k, None, home)


def best(comparison: Comparison, top_k: int, excluded: Excluded | None, home: torch.device) -> Matches:
    """Matches of a comparison on the device `home`, pairs where `excluded` is true left out.

    Raises:
        UserError: `top_k` below 1.
    """
    if top_k < 1:
        raise UserError(f"top_k {top_k}: expected at least 1")
    shape = comparison.query.num_samples, min(top_k, comparison.candidates.num_samples)
    values = torch.full(shape, -torch.inf, dtype=comparison.dtype, device=comparison.device)
    indices = torch.full(shape, -1, dtype=torch.int64, device=comparison.device)
    for rows, columns, scores in comparison.tiles():
        scores.masked_fill_(scores.isnan(), -torch.inf)
        if excluded is not None:
            scores.masked_fill_(excluded(rows, columns), -torch.inf)
        first, places = _first_of(scores, shape[1])
        # Those found before stand first: they have lower positions, and a stable sort keeps them before their equals.
        joined = torch.cat([values[rows], first], dim=1)
        where = torch.cat([indices[rows], places + columns.start], dim=1)
        joined, order = joined.sort(dim=1, descending=True, stable=True)
        values[rows], indices[rows] = joined[:, : shape[1]], where.gather(1, order)[:, : shape[1]]
    indices.masked_fill_(values == -torch.inf, -1)
    return Matches(scores=values.to(home), indices=indices.to(home))


def _first_of(scores: Float[Tensor, "r c"], top_k: int) -> tuple[Float[Tensor, "r k"], Int64[Tensor, "r k"]]:
    """The highest scores of each row and their places, ties by lower place: `topk` leaves their choice open."""
    num = min(top_k, scores.shape[1])
    values, places = scores.topk(num, dim=1)
    last = values[:, -1:]
    tied = ((scores >= last).sum(dim=1) > num) & (last[:, 0] > -torch.inf)
    if tied.any():
        sorted_values, order = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], places[tied] = sorted_values[:, :num], order[:, :num]
    places, order = places.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)
