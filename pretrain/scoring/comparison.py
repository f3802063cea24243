"""Queries against candidates by one score, a tile at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from data_pipeline.settings import UserError, nearest
from pretrain.objectives.embeddings import Embeddings
from pretrain.scoring.cosines import CENTROID, COSINE, SUMMED_COSINE
from pretrain.scoring.score import Factors, Score
from pretrain.scoring.side import Rows, embeddings_of, tuples
from pretrain.scoring.singular_value import SINGULAR_VALUE
from pretrain.scoring.volume import VOLUME

SCORES: dict[str, Score] = {s.name: s for s in (COSINE, SUMMED_COSINE, CENTROID, VOLUME, SINGULAR_VALUE)}
TILE = 1024
MATCHED_AT_ONCE = 64  # of a square tile only the diagonal is wanted

Side = Embeddings | Mapping[str, Tensor]  # rows [n, D] by modality


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two sides, the score that compares them, and how it is computed.

    dtype, device: of the arithmetic. tile: samples of each side scored at once. What is prepared of a sample is
    prepared again for each tile that it meets, so that memory above the inputs does not grow with either side.
    """

    query: Embeddings
    candidates: Embeddings
    score: Score
    dtype: torch.dtype
    device: torch.device
    tile: int

    @classmethod
    def of(
        cls,
        query: Side,
        candidates: Side,
        score: str,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | None = None,
        tile: int = TILE,
    ) -> Comparison:
        """Checked; of plain rows, those with NaN are missing. device: None is that of the query.

        Raises:
            UserError: an unknown score, a side without a modality, rows of different shapes, more than one vector a
                side for `cosine`, fewer dimensions than vectors for `volume`, a tile below 1.
        """
        if score not in SCORES:
            raise UserError(f"score '{score}': unknown; {nearest(score, SCORES)}")
        if tile < 1:
            raise UserError(f"tile {tile}: expected at least 1")
        query = query if isinstance(query, Embeddings) else embeddings_of(query, "query")
        candidates = candidates if isinstance(candidates, Embeddings) else embeddings_of(candidates, "candidates")
        dims = [next(iter(side.vectors.values())).shape[1] for side in (query, candidates)]
        if dims[0] != dims[1]:
            raise UserError(f"query rows have {dims[0]} dimensions, candidates {dims[1]}: expected the same model's")
        num = len(query.vectors), len(candidates.vectors)
        if SCORES[score].one_vector_a_side and num != (1, 1):
            raise UserError(
                f"score '{score}': {num[0]} and {num[1]} modalities; expected one a side, or summed_cosine or centroid"
            )
        if SCORES[score].needs_dims and sum(num) > dims[0]:
            raise UserError(f"score '{score}': {sum(num)} vectors in {dims[0]} dimensions: every one would be 0")
        device = next(iter(query.vectors.values())).device if device is None else device
        return cls(
            query=query, candidates=candidates, score=SCORES[score], dtype=dtype, device=device, tile=tile
        )  # fmt: skip

    def prepared(self, embeddings: Embeddings, rows: Rows) -> Factors:
        """What the score needs of some samples of a side."""
        some = tuples(embeddings, rows, self.dtype, self.device)
        return self.score.prepare(some) | {"offset": some.offset}

    def tiles(self) -> Iterator[tuple[slice, slice, Float[Tensor, "r c"]]]:
        """Rows, columns and their scores: for the first candidates all queries, then for the next ones."""
        for columns in _slices(self.candidates.num_samples, self.tile):
            candidates = self.prepared(self.candidates, columns)
            for rows in _slices(self.query.num_samples, self.tile):
                yield rows, columns, self.between(self.prepared(self.query, rows), candidates)

    def between(self, query: Factors, candidates: Factors) -> Float[Tensor, "r c"]:
        """Scores of prepared queries against prepared candidates."""
        found = self.score.tile(query, candidates)
        return found.add_(query["offset"][:, None]).add_(candidates["offset"])

    def matched(self, rows: Int[Tensor, " n"], columns: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Scores of query `rows[i]` with candidate `columns[i]`."""
        if len(rows) == 0:
            return torch.zeros(0, dtype=self.dtype, device=self.device)
        parts = []
        at_once = min(self.tile, MATCHED_AT_ONCE)
        for some, others in zip(rows.split(at_once), columns.split(at_once), strict=True):
            query, candidates = self.prepared(self.query, some), self.prepared(self.candidates, others)
            parts.append(self.between(query, candidates).diagonal())
        return torch.cat(parts)


@torch.no_grad()
def scores(
    query: Side,
    candidates: Side,
    score: str,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
    tile: int = TILE,
) -> Float[Tensor, "q c"]:
    """All scores, higher is better, on the device of the query; -inf where a side has nothing, NaN where it holds NaN.

    query, candidates: rows by modality, missing ones NaN or zeros, or Embeddings with masks (whose NaN is not missing).
    Any number of modalities a side. score: see `names`. dtype: float32 is faster, and wrong by up to 3e-4 where volumes
    are small. tile: memory above the result; never changes it but by rounding.

    Raises:
        UserError: see `Comparison.of`.
    """
    comparison = Comparison.of(query, candidates, score, dtype=dtype, device=device, tile=tile)
    home = next(iter(comparison.query.vectors.values())).device
    found = torch.empty(comparison.query.num_samples, comparison.candidates.num_samples, dtype=dtype, device=home)
    for rows, columns, some in comparison.tiles():
        found[rows, columns] = some.to(home)
    return found


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
