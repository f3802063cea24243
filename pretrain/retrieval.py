"""From embeddings to retrieval metrics: scores, ranks with ties against the truth, a report. No model, no ranks.

Sample i of the query side belongs to sample i of the candidate side and to no other: several samples that show the
same item are distractors of each other here, so duplicates lower the figures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data_pipeline.settings import nearest
from pretrain.retrieval_report import Z_95, RetrievalMetrics, RetrievalReport, retrieval_metrics

TIE_TOLERANCE = 1e-7  # float32 embeddings carry no finer difference; a square root makes 1e-16 into 1e-8
BLOCK_ELEMENTS = 1 << 22  # scores held at once: 32 MB of float64

MIN_PAIRS = 8  # fewer say nothing about a sign

Vectors = Mapping[str, Float[Tensor, "samples dim"]]
Pair = tuple[str, str]


def cosine_scores(a: Float[Tensor, "q dim"], b: Float[Tensor, "c dim"]) -> Float[Tensor, "q c"]:
    """Cosine of every row of `a` with every row of `b`, in float64; 0 for a row of zeros."""
    return _unit(a) @ _unit(b).T


def summed_cosine_scores(query: Float[Tensor, "q dim"], others: Vectors) -> Float[Tensor, "q c"]:
    """Sum over modalities of the cosine with the query, in float64.

    This is the dot product with the *un-normalised* sum of the candidate's unit vectors: a candidate whose modalities
    agree with each other scores higher than one whose modalities cancel.
    """
    return _unit(query) @ _unit_sum(others).T


def volume_scores(anchor: Float[Tensor, "q dim"], others: Vectors, tile: int = 1024) -> Float[Tensor, "q c"]:
    """Minus the volume of the parallelotope that a query and a candidate's vectors span, in float64: 0 is best.

    By QR of the candidate's k - 1 unit vectors (GRAM, arXiv 2412.11959, computed without a determinant):
    prod |R_ii| * sqrt(max(|a|^2 - |Q^T a|^2, 0)). There is no eps under the root, which would bias small volumes.

    Args:
        anchor: the queries.
        others: modality -> rows of the candidates; all of one shape.
        tile: candidates scored at once; memory above the result is linear in it. Never changes the result.

    Raises:
        ValueError: fewer dimensions than vectors, where every volume would be 0.
    """
    queries, (bases, volumes) = _unit(anchor), _bases(others)
    tiles = [_volumes(queries, bases[:, s], volumes[s]) for s in _slices(len(volumes), tile)]
    return -torch.cat([queries.new_zeros(len(queries), 0), *tiles], dim=1)


def rank_of_truth(scores: Float[Tensor, "q c"], truth: Int[Tensor, " q"], tolerance: float = 0.0) -> Int[Tensor, " q"]:
    """0-based rank of each query's true candidate: how many others score at least as high.

    Ties, scores within `tolerance` below the truth's, and NaN count against the truth, so a model that maps everything
    to one point ranks last everywhere instead of first.
    """
    true_score = scores.gather(1, truth[:, None])
    beaten = scores < true_score - tolerance  # False with NaN on either side
    beaten.scatter_(1, truth[:, None], True)  # the truth does not compete with itself
    return (~beaten).sum(dim=1)


def evaluate_retrieval(
    vectors: Vectors, present: Mapping[str, Bool[Tensor, " samples"]] | None, anchor: str = "text"
) -> RetrievalReport:
    """Retrieval in every direction: between single modalities by cosine, and between the anchor and every set of at
    least two of the others (with two modalities in all: the single other) by volume and by summed cosine.

    A candidate counts where all modalities of its side are there, a query where those of both sides are: without its
    true candidate it could not be answered. A row of zeros has no direction and counts as missing.

    Args:
        vectors: unit rows by modality, on any device.
        present: which rows are there; None: all.

    Raises:
        ValueError: `anchor` is no modality of `vectors`.
    """
    if anchor not in vectors:
        raise ValueError(f"anchor '{anchor}': no such modality; {nearest(anchor, vectors)}")
    units = {name: _unit(rows) for name, rows in vectors.items()}
    there = {name: (rows != 0).any(dim=1) for name, rows in vectors.items()}
    if present is not None:
        there = {name: mask & present[name].to(mask.device) for name, mask in there.items()}
    metrics: list[RetrievalMetrics] = []
    for a, b in itertools.combinations(units, 2):
        metrics += _both_directions(units, there, a, (b,), "cosine")
    others = [name for name in units if name != anchor]
    for size in range(min(2, len(others)), len(others) + 1):
        for names in itertools.combinations(others, size):
            metrics += _both_directions(units, there, anchor, names, "volume")
            metrics += _both_directions(units, there, anchor, names, "summed_cosine")
    pairs = {(a, b): _positive_cosines(units, there, a, b) for a, b in itertools.combinations(units, 2)}
    means = {pair: float(cosines.mean()) for pair, cosines in pairs.items()}
    apart = [pair for pair, cosines in pairs.items() if is_anti_aligned(cosines)]
    return RetrievalReport(
        anchor=anchor,
        num_samples=len(next(iter(vectors.values()))),
        num_present={name: int(mask.sum()) for name, mask in there.items()},
        positive_cosine={"-".join(pair): None if math.isnan(value) else value for pair, value in means.items()},
        anti_aligned=tuple("-".join(pair) for pair in apart),
        metrics=tuple(metrics),
        warnings=tuple(_warnings(means, apart, there, anchor)),
    )


def is_anti_aligned(cosines: Float[Tensor, " pairs"]) -> bool:
    """Whether matched pairs point away from each other: at least `MIN_PAIRS` of them, and the upper end of the 95 %
    interval of their mean cosine (mean + 1.96 standard errors) is negative. Few pairs are negative by accident.
    """
    if len(cosines) < MIN_PAIRS:
        return False
    return bool(cosines.mean() + Z_95 * cosines.std() / math.sqrt(len(cosines)) < 0)


def _warnings(
    means: Mapping[Pair, float], apart: Sequence[Pair], there: Mapping[str, Tensor], anchor: str
) -> Iterator[str]:
    with_anchor = {a if b == anchor else b: value for (a, b), value in means.items() if anchor in (a, b)}
    for (a, b), value in means.items():
        num_pairs = int((there[a] & there[b]).sum())
        if not num_pairs:
            yield f"no sample has both {a} and {b}: their retrieval was not measured"
        elif math.isnan(value):
            yield f"embeddings of {a} or {b} hold NaN: such a candidate counts as better than the true one"
        elif (a, b) in apart:
            said = f"{a} and {b} are anti-aligned: mean positive cosine {value:+.2f} over {num_pairs} samples"
            if anchor not in (a, b) and min(with_anchor[a], with_anchor[b]) > 0:
                yield (
                    f"{said}, while {anchor} agrees with both ({with_anchor[a]:+.2f} and {with_anchor[b]:+.2f}): "
                    "nothing to mend where they are independent of each other, else add a term for this pair"
                )
            else:
                yield f"{said}; volumes do not see the sign, a pairwise term or the orientation of gram does"


def _positive_cosines(units: Vectors, there: Mapping[str, Tensor], a: str, b: str) -> Float[Tensor, " pairs"]:
    """Of the samples that have both; their mean is NaN when none has, or one holds NaN."""
    both = there[a] & there[b]
    return (units[a][both] * units[b][both]).sum(dim=1)


def _both_directions(
    units: Vectors, there: Mapping[str, Tensor], anchor: str, names: tuple[str, ...], score: str
) -> list[RetrievalMetrics]:
    """anchor -> names and names -> anchor, scored in blocks of queries so that memory is linear in the samples."""
    rows = there[anchor].nonzero()[:, 0]
    columns = torch.stack([there[name] for name in names]).all(dim=0).nonzero()[:, 0]
    one, many = units[anchor][rows], {name: units[name][columns] for name in names}
    query_rows = torch.isin(rows, columns).nonzero()[:, 0]
    query_columns = torch.isin(columns, rows).nonzero()[:, 0]  # of the same samples, in the same order
    scores = _scorer(one, many, score)
    joined = "+".join(names)
    block = max(1, BLOCK_ELEMENTS // max(1, len(names) * max(len(rows), len(columns))))
    forth = [rank_of_truth(scores(query_rows[s], slice(None)), query_columns[s], TIE_TOLERANCE)
             for s in _slices(len(query_rows), block)]  # fmt: skip
    back = [rank_of_truth(scores(slice(None), query_columns[s]).T, query_rows[s], TIE_TOLERANCE)
            for s in _slices(len(query_rows), block)]  # fmt: skip
    nothing = rows.new_zeros(0)
    return [
        retrieval_metrics(torch.cat([nothing, *forth]), len(columns), anchor, joined, score),
        retrieval_metrics(torch.cat([nothing, *back]), len(rows), joined, anchor, score),
    ]


Index = Tensor | slice


def _scorer(one: Tensor, many: Vectors, score: str) -> Callable[[Index, Index], Tensor]:
    """Scores of some rows of `one` against some of `many` (unit rows); what depends on one side is computed once."""
    if score == "volume":
        bases, volumes = _bases(many)
        return lambda rows, columns: -_volumes(one[rows], bases[:, columns], volumes[columns])
    total = _unit_sum(many)
    return lambda rows, columns: one[rows] @ total[columns].T


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.detach().double(), dim=1)


def _unit_sum(others: Vectors) -> Tensor:
    return torch.stack([_unit(rows) for rows in others.values()]).sum(dim=0)


def _bases(others: Vectors) -> tuple[Float[Tensor, "others c dim"], Float[Tensor, " c"]]:
    """Orthonormal basis of each candidate's unit vectors, and the volume they span."""
    stacked = torch.stack([_unit(rows) for rows in others.values()], dim=2)  # [c, dim, others]
    num_dims, num_others = stacked.shape[1:]
    if num_dims < num_others + 1:
        raise ValueError(f"{num_others + 1} vectors in {num_dims} dimensions: every volume would be 0")
    q, r = torch.linalg.qr(stacked)
    return q.permute(2, 0, 1), r.diagonal(dim1=1, dim2=2).prod(dim=1).abs()


def _volumes(
    queries: Float[Tensor, "q dim"], bases: Float[Tensor, "others c dim"], volumes: Float[Tensor, " c"]
) -> Float[Tensor, "q c"]:
    squared = queries.square().sum(dim=1)[:, None].repeat(1, len(volumes))
    for basis in bases:
        squared -= (queries @ basis.T).square()
    return squared.clamp_(min=0).sqrt_() * volumes


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))
