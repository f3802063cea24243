"""The lower part of a report: one set of samples looked at closely: retrieval, gallery, scores, projection."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.settings import UserError
from data_pipeline.shards import ShardedDataset, sample_name
from pretrain.data.transforms import Augmentation, chosen_caption
from pretrain.kept_embeddings import KeptEmbeddings
from pretrain.report import figures
from pretrain.report.gallery import Gallery, make_gallery, open_dataset
from pretrain.report.history import EvaluatedSet, RunHistory
from pretrain.report.overview import Panel
from pretrain.report.projection import project
from pretrain.report.scores import Question, answers, score_samples
from pretrain.scoring.names import SCORE_LABELS

MAX_WORDS = 120  # characters of a caption in a hover


@dataclass(frozen=True, kw_only=True)
class RetrievalRow:
    """A row of the table, in words; width: of the bar behind R@1, in per cent."""

    direction: str
    score: str
    recall_at_1: str
    interval: str
    recall_at_5: str
    recall_at_10: str
    median_rank: str
    chance: str
    count: str
    width: float


@dataclass(frozen=True, kw_only=True)
class Closeup:
    """A set of samples. missing: why there is neither gallery nor figures of embeddings, or no gallery; in a line."""

    title: str
    note: str
    rows: list[RetrievalRow]
    retrieval: Panel
    cosines: list[tuple[str, float | None, bool]]  # pair, mean of its matched samples, whether it is anti-aligned
    question: Question | None = None
    gallery: Gallery | None = None
    num_left_out: int = 0  # samples that lack a modality and are no candidates
    histograms: tuple[Panel, ...] = ()
    projection: Panel | None = None
    missing: str | None = None


def make_closeup(run: RunHistory, evaluated: EvaluatedSet, max_bytes: int) -> Closeup:
    """Everything about one set of a run; what cannot be had is said in `missing`."""
    metrics = evaluated.result["metrics"]
    groups = {score: [row for row in metrics if row["score"] == score] for score in {r["score"]: 0 for r in metrics}}
    base: dict[str, Any] = {
        "title": evaluated.name,
        "note": _note(run, evaluated),
        "rows": [_row(row) for row in metrics],
        "retrieval": Panel(title="R@1 by direction", figure=figures.figure_json(figures.retrieval_figure(groups))),
        "cosines": _in_order(run, evaluated.result),
    }
    try:
        kept = _load(evaluated)
    except UserError as error:
        return Closeup(**base, missing=str(error))
    question = Question.of(run.config, kept)
    found = answers(question, kept)
    histograms = tuple(_histogram(sample) for sample in score_samples(question, kept))
    gallery, dataset, missing = None, None, None
    try:
        dataset = open_dataset(kept)
    except UserError as error:
        missing = f"no gallery: {error}"
    else:
        gallery = make_gallery(found, kept, dataset, run.config, max_bytes)
    projection = _projection(kept, dataset)
    if dataset is not None:
        dataset.close()
    if not found:
        missing = f"no gallery: no sample has {question.query} and {' and '.join(question.others)}"
    return Closeup(
        **base,
        question=question,
        gallery=gallery,
        num_left_out=len(kept.positions) - len(question.candidates),
        histograms=histograms,
        projection=projection,
        missing=missing,
    )


def _load(evaluated: EvaluatedSet) -> KeptEmbeddings:
    if not evaluated.embeddings.is_file():
        raise UserError("no embeddings were kept: run 'parallelotope evaluate' for a gallery and figures of them")
    kept = KeptEmbeddings.load(evaluated.embeddings)
    if evaluated.step is not None and kept.step != evaluated.step:
        raise UserError(f"the kept embeddings are of step {kept.step}, the figures of step {evaluated.step}")
    return kept


def _note(run: RunHistory, evaluated: EvaluatedSet) -> str:
    result = evaluated.result
    there = ", ".join(f"{result['num_present'][name]:,} {name}" for name in run.config.towers.names)
    step = "" if evaluated.step is None else f" after step {evaluated.step:,}"
    return f"{result['num_samples']:,} samples{step}; of these have: {there}"


def _in_order(run: RunHistory, result: dict[str, Any]) -> list[tuple[str, float | None, bool]]:
    names = ["-".join(pair) for pair in itertools.combinations(run.config.towers.names, 2)]
    cosines, apart = result["positive_cosine"], result["anti_aligned"]
    return [(name, cosines[name], name in apart) for name in names if name in cosines]


def _row(row: dict[str, Any]) -> RetrievalRow:
    low, high = 100 * row["recall_at_1_low"], 100 * row["recall_at_1_high"]
    return RetrievalRow(
        direction=f"{row['query']} → {row['candidates']}",
        score=SCORE_LABELS.get(row["score"], row["score"]),
        recall_at_1=f"{100 * row['recall_at_1']:.1f}",
        interval=f"{low:.1f}–{high:.1f}",
        recall_at_5=f"{100 * row['recall_at_5']:.1f}",
        recall_at_10=f"{100 * row['recall_at_10']:.1f}",
        median_rank="–" if row["median_rank"] is None else f"{row['median_rank']:g}",
        chance=f"{100 * row['chance_recall_at_1']:.2f}",
        count=f"{row['num_queries']:,} / {row['num_candidates']:,}",
        width=round(100 * row["recall_at_1"], 1),
    )


def _histogram(sample: Any) -> Panel:
    own = SCORE_LABELS.get(sample.name, "").capitalize()
    title = own or f"Cosine {sample.name.replace('-', ' – ')}"
    return Panel(title=title, figure=figures.figure_json(figures.histogram_figure(sample)))


def _projection(kept: KeptEmbeddings, dataset: ShardedDataset | None) -> Panel | None:
    found = project(kept)
    if found is None:
        return None
    rows = sorted({row for where in found.rows.values() for row in where.tolist()})
    figure = figures.projection_figure(found, dict(zip(rows, _words(kept, dataset, rows), strict=True)))
    share = f"{100 * sum(found.variance_share):.0f} % of the variance"
    return Panel(title="Embeddings on a plane", figure=figures.figure_json(figure), value=share, wide=True)


def _words(kept: KeptEmbeddings, dataset: ShardedDataset | None, rows: Sequence[int]) -> list[str]:
    """Name, caption and key of samples; their positions where the dataset is gone."""
    positions = kept.positions[list(rows)].tolist()
    if dataset is None:
        return [f"sample {position}" for position in positions]
    table = [dataset.row(position) for position in positions]
    words = [f"{sample_name(row)}: {chosen_caption(row, Augmentation()) or 'no caption'}" for row in table]
    cut = [text if len(text) <= MAX_WORDS else text[: MAX_WORDS - 1] + "…" for text in words]
    return [f"{text} ({row['key']})" for text, row in zip(cut, table, strict=True)]
