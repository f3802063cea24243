"""What a run's own score says of kept embeddings: ranks of the true, the best candidates, matched and unmatched."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pretrain.config import RunConfig
from pretrain.evaluate import anchor_of, own_score
from pretrain.kept_embeddings import KeptEmbeddings
from pretrain.retrieval import TIE_TOLERANCE, rank_of_truth
from pretrain.scoring import ScoreName, scores

MAX_QUERIES = 512
MAX_CANDIDATES = 2048  # of the histograms; ranks are among all candidates
NUM_BEST = 5
BLOCK_ELEMENTS = 1 << 22  # scores held at once: 32 MB of float64


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one query finds. Rows are rows of the kept embeddings; scores: higher is nearer; rank counts from 1."""

    query: int
    rank: int
    truth_score: float
    best: list[tuple[int, float]]  # the first candidates and their scores; the truth comes after its equals


@dataclass(frozen=True, kw_only=True)
class ScoreSamples:
    """Scores of matched and of unmatched tuples under one score."""

    name: str  # a score of `pretrain.scoring.names`, or a pair "a-b"
    positive: Float[Tensor, " p"]
    negative: Float[Tensor, " n"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Retrieval by a run's own score: which modality asks, for which others, among which rows."""

    query: str
    others: tuple[str, ...]
    score: ScoreName
    queries: Int64[Tensor, " q"]  # rows that have all modalities
    candidates: Int64[Tensor, " c"]  # rows that have all of `others`

    @classmethod
    def of(cls, config: RunConfig, kept: KeptEmbeddings) -> Question:
        """Text asks where there is text, the run's anchor otherwise."""
        names = tuple(kept.vectors)
        query = "text" if "text" in names else anchor_of(config)
        others = tuple(name for name in names if name != query)
        there = {name: kept.present[name] & (rows != 0).any(dim=1) for name, rows in kept.vectors.items()}
        candidates = torch.stack([there[name] for name in others]).all(dim=0)
        return cls(
            query=query,
            others=others,
            score=own_score(config),
            queries=(candidates & there[query]).nonzero()[:, 0],
            candidates=candidates.nonzero()[:, 0],
        )

    def scores(self, kept: KeptEmbeddings, queries: Tensor, candidates: Tensor) -> Float[Tensor, "q c"]:
        """Scores of rows `queries` against rows `candidates`."""
        many = {name: kept.vectors[name][candidates] for name in self.others}
        return scores({self.query: kept.vectors[self.query][queries]}, many, self.score)


def spread(rows: Int64[Tensor, " n"], most: int) -> Int64[Tensor, " m"]:
    """At most `most` of `rows`, at equal distances."""
    if len(rows) <= most:
        return rows
    return rows[torch.arange(most) * len(rows) // most]


def answers(question: Question, kept: KeptEmbeddings) -> list[Answer]:
    """What at most `MAX_QUERIES` queries, evenly spread over the split, find among all candidates."""
    queries, candidates = spread(question.queries, MAX_QUERIES), question.candidates
    found: list[Answer] = []
    if not len(queries):
        return found
    for part in queries.split(max(1, BLOCK_ELEMENTS // max(1, len(candidates)))):
        of_all = question.scores(kept, part, candidates)
        truth = torch.searchsorted(candidates, part)
        ranks = rank_of_truth(of_all, truth, TIE_TOLERANCE).tolist()
        true_scores = of_all.gather(1, truth[:, None])[:, 0].tolist()
        rivals = of_all.scatter(1, truth[:, None], -torch.inf)
        values, places = rivals.topk(min(NUM_BEST, rivals.shape[1] - 1), dim=1)
        for row, rank, true_score, top, where in zip(
            part.tolist(), ranks, true_scores, values.tolist(), candidates[places].tolist(), strict=True
        ):
            best = list(zip(where, top, strict=True))
            if rank < NUM_BEST:
                best.insert(rank, (row, true_score))
            found.append(Answer(query=row, rank=rank + 1, truth_score=true_score, best=best[:NUM_BEST]))
    return found


def score_samples(question: Question, kept: KeptEmbeddings) -> list[ScoreSamples]:
    """Matched and unmatched scores: by the run's own score, and the cosine of each pair of modalities.

    At most `MAX_QUERIES` rows against at most `MAX_CANDIDATES`, both evenly spread.
    """
    samples = [_own_samples(question, kept)] if len(question.queries) else []
    for a, b in itertools.combinations(kept.vectors, 2):
        if len(kept.vectors) == 2 and question.score in ("summed_cosine", "centroid"):
            break  # the same as the run's own score
        both = (kept.present[a] & kept.present[b]).nonzero()[:, 0]
        rows, columns = spread(both, MAX_QUERIES), spread(both, MAX_CANDIDATES)
        found = scores({a: kept.vectors[a][rows]}, {b: kept.vectors[b][columns]}, "cosine")
        matched = (kept.vectors[a][rows].double() * kept.vectors[b][rows].double()).sum(dim=1)
        negative = found[rows[:, None] != columns[None]]
        samples.append(ScoreSamples(name=f"{a}-{b}", positive=matched, negative=negative))
    return [sample for sample in samples if len(sample.positive)]


def _own_samples(question: Question, kept: KeptEmbeddings) -> ScoreSamples:
    rows, columns = spread(question.queries, MAX_QUERIES), spread(question.candidates, MAX_CANDIDATES)
    negative = torch.cat(
        [question.scores(kept, part, columns)[part[:, None] != columns[None]] for part in rows.split(64)]
    )
    matched = torch.cat([question.scores(kept, part, part).diagonal() for part in rows.split(64)])
    return ScoreSamples(name=question.score, positive=matched, negative=negative)
