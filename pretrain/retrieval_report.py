"""What a retrieval evaluation reports: recalls, ranks, chance and an interval for each direction; JSON and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from pretrain.scoring.names import SCORE_LABELS

if TYPE_CHECKING:
    from rich.table import Table

Z_95 = 1.959964  # standard normal: 95 % lie within so many deviations
SHORT = {"summed_cosine": "sum", "singular_value": "sing"}  # a table has 80 columns


@dataclass(frozen=True, kw_only=True)
class RetrievalMetrics:
    """One direction of retrieval under one score. Recalls are shares of queries in [0, 1]; ranks count from 1."""

    query: str  # modality, or several joined by "+"
    candidates: str
    score: str  # of `pretrain.scoring.names`
    num_queries: int
    num_candidates: int
    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    median_rank: float | None  # None without queries
    chance_recall_at_1: float
    recall_at_1_low: float  # 95 % Wilson interval over queries
    recall_at_1_high: float


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """All directions of one set of samples."""

    anchor: str
    num_samples: int
    num_present: dict[str, int]  # samples that have the modality
    positive_cosine: dict[str, float | None]  # "a-b" -> mean cosine of matched pairs; None: no sample has both, or NaN
    anti_aligned: tuple[str, ...]  # those pairs whose mean is negative beyond chance
    metrics: tuple[RetrievalMetrics, ...]
    warnings: tuple[str, ...]

    def find(self, query: str | Sequence[str], candidates: str | Sequence[str], score: str) -> RetrievalMetrics:
        """The metrics of one direction; a side is a modality or several, in any order.

        Raises:
            KeyError: this report has no such row.
        """
        wanted = (_names(query), _names(candidates), score)
        for row in self.metrics:
            if (_names(row.query), _names(row.candidates), row.score) == wanted:
                return row
        rows = [f"{row.query} -> {row.candidates} by {row.score}" for row in self.metrics]
        raise KeyError(f"no row {query} -> {candidates} by {score}; rows: {rows}")

    def to_json(self) -> dict[str, Any]:
        """A value that `json.dumps` takes, without NaN."""
        value = asdict(self)
        return value | {name: list(value[name]) for name in ("anti_aligned", "metrics", "warnings")}

    def table(self, title: str = "retrieval") -> Table:
        """A rich table that fits 80 columns; recalls and chance in per cent."""
        from rich import box
        from rich.table import Table

        cosines = [f"{pair} {'none' if v is None else f'{v:+.2f}'}" for pair, v in self.positive_cosine.items()]
        notes = (
            "recall and chance in %; 95 %: Wilson interval of R@1; rank: median; n queries of so many candidates; "
            f"{_abbreviations(self.metrics)}. Mean positive cosine: {', '.join(cosines)}"
        )
        table = Table(
            title=title, title_justify="left", caption=notes, caption_justify="left",
            box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False,
        )  # fmt: skip
        table.add_column("query -> candidates")
        table.add_column("score", no_wrap=True)
        for name in ("R@1", "95 %", "R@5", "R@10", "rank", "chance", "n", "of"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.metrics:
            table.add_row(
                f"{row.query} -> {row.candidates}",
                SHORT.get(row.score, row.score),
                _percent(row.recall_at_1),
                f"{_percent(row.recall_at_1_low)}-{_percent(row.recall_at_1_high)}" if row.num_queries else "-",
                _percent(row.recall_at_5),
                _percent(row.recall_at_10),
                "-" if row.median_rank is None else f"{row.median_rank:g}",
                f"{100 * row.chance_recall_at_1:.2f}",
                str(row.num_queries),
                str(row.num_candidates),
            )
        return table


def retrieval_metrics(
    ranks: Int[Tensor, " q"], num_candidates: int, query: str, candidates: str, score: str
) -> RetrievalMetrics:
    """Summarise 0-based `ranks`; without queries every recall is 0 and the median rank None."""
    num_queries = len(ranks)
    recall = {k: float((ranks < k).double().mean()) if num_queries else 0.0 for k in (1, 5, 10)}
    low, high = wilson_interval(recall[1], num_queries)
    return RetrievalMetrics(
        query=query,
        candidates=candidates,
        score=score,
        num_queries=num_queries,
        num_candidates=num_candidates,
        recall_at_1=recall[1],
        recall_at_5=recall[5],
        recall_at_10=recall[10],
        median_rank=float(ranks.double().quantile(0.5)) + 1 if num_queries else None,
        chance_recall_at_1=1 / num_candidates if num_candidates else 0.0,
        recall_at_1_low=low,
        recall_at_1_high=high,
    )


def wilson_interval(share: float, num_queries: int) -> tuple[float, float]:
    """95 % score interval of a share of queries (Wilson 1927, JASA 22, 209-212); all of [0, 1] without queries.

    Unlike a bootstrap it has a width where every query hits or every one misses.
    """
    if num_queries == 0:
        return 0.0, 1.0
    spread = Z_95**2 / num_queries
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def _abbreviations(metrics: Sequence[RetrievalMetrics]) -> str:
    found = {row.score for row in metrics}
    return "; ".join(f"{short}: {SCORE_LABELS[score]}" for score, short in SHORT.items() if score in found)


def _percent(share: float) -> str:
    return "100" if share == 1 else f"{100 * share:.1f}"


def _names(side: str | Sequence[str]) -> frozenset[str]:
    return frozenset(side.split("+") if isinstance(side, str) else side)
