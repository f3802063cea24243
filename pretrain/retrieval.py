"""From embeddings to retrieval metrics: ranks with ties against the truth, a report. No model, no ranks.

Sample i of the query side belongs to sample i of the candidate side and to no other: several samples that show the
same item are distractors of each other here, so duplicates lower the figures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data_pipeline.settings import nearest
from pretrain.objectives.embeddings import Embeddings
from pretrain.retrieval_report import Z_95, RetrievalMetrics, RetrievalReport, retrieval_metrics
from pretrain.scoring.comparison import TILE, Comparison

TIE_TOLERANCE = 1e-7  # float32 embeddings carry no finer difference; a square root makes 1e-16 into 1e-8
JOINT_SCORES = ("volume", "summed_cosine")  # of the anchor with several others, whatever a run was trained for
MIN_PAIRS = 8  # fewer say nothing about a sign

Vectors = Mapping[str, Float[Tensor, "samples dim"]]
Pair = tuple[str, str]


def rank_of_truth(scores: Float[Tensor, "q c"], truth: Int[Tensor, " q"], tolerance: float = 0.0) -> Int[Tensor, " q"]:
    """0-based rank of each query's true candidate: how many others score at least as high.

    Ties, scores within `tolerance` below the truth's, and NaN count against the truth, so a model that maps everything
    to one point ranks last everywhere instead of first.
    """
    places = torch.arange(scores.shape[1], device=scores.device)
    return _unbeaten(scores, scores.gather(1, truth[:, None]), truth[:, None] == places, tolerance).sum(dim=1)


def evaluate_retrieval(
    vectors: Vectors,
    present: Mapping[str, Bool[Tensor, " samples"]] | None,
    anchor: str = "text",
    joint_scores: Sequence[str] = JOINT_SCORES,
    tile: int = TILE,
) -> RetrievalReport:
    """Retrieval in every direction: between single modalities by cosine, and between the anchor and every set of at
    least two of the others (with two modalities in all: the single other) by each of `joint_scores`.

    A candidate counts where all modalities of its side are there, a query where those of both sides are: without its
    true candidate it could not be answered. A row of zeros has no direction and counts as missing.

    Args:
        vectors: unit rows by modality, on any device.
        present: which rows are there; None: all.
        anchor: a modality.
        joint_scores: see `pretrain.scoring.names`.
        tile: samples of each side scored at once; memory, never the result, depends on it.

    Raises:
        ValueError: `anchor` is no modality of `vectors`.
        UserError: an unknown score, or fewer dimensions than vectors where volumes are asked for.
    """
    if anchor not in vectors:
        raise ValueError(f"anchor '{anchor}': no such modality; {nearest(anchor, vectors)}")
    there = {name: (rows != 0).any(dim=1) for name, rows in vectors.items()}
    if present is not None:
        there = {name: mask & present[name].to(mask.device) for name, mask in there.items()}
    metrics: list[RetrievalMetrics] = []
    for a, b in itertools.combinations(vectors, 2):
        metrics += _both_directions(vectors, there, a, (b,), "cosine", tile)
    others = [name for name in vectors if name != anchor]
    for size in range(min(2, len(others)), len(others) + 1):
        for names in itertools.combinations(others, size):
            for score in joint_scores:
                metrics += _both_directions(vectors, there, anchor, names, score, tile)
    pairs = {(a, b): _positive_cosines(vectors, there, a, b) for a, b in itertools.combinations(vectors, 2)}
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
                yield f"{said}; volumes and singular values do not see the sign, a pairwise term or orientation does"


def _positive_cosines(vectors: Vectors, there: Mapping[str, Tensor], a: str, b: str) -> Float[Tensor, " pairs"]:
    """Of the samples that have both; their mean is NaN when none has, or one holds NaN."""
    both = there[a] & there[b]
    one, other = (F.normalize(vectors[name][both].detach().double(), dim=1) for name in (a, b))
    return (one * other).sum(dim=1)


def _both_directions(
    vectors: Vectors, there: Mapping[str, Tensor], anchor: str, names: tuple[str, ...], score: str, tile: int
) -> list[RetrievalMetrics]:
    """anchor -> names and names -> anchor, from the same tiles of scores."""
    rows = there[anchor].nonzero()[:, 0]
    columns = torch.stack([there[name] for name in names]).all(dim=0).nonzero()[:, 0]
    comparison = Comparison.of(
        Embeddings(vectors={anchor: vectors[anchor][rows]}),
        Embeddings(vectors={name: vectors[name][columns] for name in names}),
        score,
        tile=tile,
    )
    forth, back = _ranks(comparison, rows, columns)
    joined = "+".join(names)
    return [
        retrieval_metrics(forth, len(columns), anchor, joined, score),
        retrieval_metrics(back, len(rows), joined, anchor, score),
    ]


def _ranks(comparison: Comparison, rows: Int[Tensor, " r"], columns: Int[Tensor, " c"]) -> tuple[Tensor, Tensor]:
    """0-based ranks of the truth, as `rank_of_truth` counts them: of the samples that stand on both sides, as queries
    [n], and as candidates that ask the other way round [n]. rows, columns: which samples the sides are, ascending.
    """
    with_truth = torch.isin(rows, columns).nonzero()[:, 0], torch.isin(columns, rows).nonzero()[:, 0]
    matched = comparison.matched(*with_truth)
    of_row, of_column = (
        matched.new_full((len(side),), torch.nan).index_put((where,), matched)
        for side, where in zip((rows, columns), with_truth, strict=True)
    )
    forth, back = torch.zeros_like(rows), torch.zeros_like(columns)
    for some, others, scores in comparison.tiles():
        same = rows[some, None] == columns[others]
        forth[some] += _unbeaten(scores, of_row[some, None], same, TIE_TOLERANCE).sum(dim=1)
        back[others] += _unbeaten(scores, of_column[others], same, TIE_TOLERANCE).sum(dim=0)
    return forth[with_truth[0]], back[with_truth[1]]


def _unbeaten(scores: Tensor, true_score: Tensor, truth: Tensor, tolerance: float) -> Bool[Tensor, "q c"]:
    """Which candidates count against the truth, whose own places are those where `truth`; NaN on a side does."""
    return ~((scores < true_score - tolerance) | truth)
