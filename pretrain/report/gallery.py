"""A few queries and what they find: chosen by a rule that shows the best and the worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.settings import UserError
from data_pipeline.shards import ShardedDataset
from pretrain.config import RunConfig
from pretrain.kept_embeddings import KeptEmbeddings
from pretrain.report.media import SampleView, view_sample, without_media
from pretrain.report.scores import Answer

NUM_QUERIES = 8


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One result: the sample, its place among the candidates and its score."""

    view: SampleView
    place: int
    score: float
    is_truth: bool


@dataclass(frozen=True, kw_only=True)
class GalleryQuery:
    """A query and its first results. truth: the true one, where it is not among them."""

    view: SampleView
    rank: int
    tiles: tuple[Tile, ...]
    truth: Tile | None


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """num_asked: queries that the shown ones were chosen from."""

    queries: tuple[GalleryQuery, ...]
    num_asked: int


def choose(found: Sequence[Answer], wanted: int = NUM_QUERIES) -> list[Answer]:
    """`wanted` answers at equal steps from the best-found to the worst-found; equal ranks in the order of the split."""
    ordered = sorted(found, key=lambda answer: (answer.rank, answer.query))
    if len(ordered) <= wanted:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (wanted - 1))] for i in range(wanted)]


def open_dataset(kept: KeptEmbeddings) -> ShardedDataset:
    """The dataset that the embeddings are of.

    Raises:
        UserError: it is gone, or holds other samples now.
    """
    try:
        dataset = ShardedDataset(kept.data, kept.split)
    except OSError as error:
        raise UserError(f"dataset {kept.data}: cannot be read: {error.strerror}") from error
    if dataset.digest != kept.digest:
        dataset.close()
        raise UserError(f"dataset {kept.data}: sharded again since then: its samples are not those of the embeddings")
    return dataset


def make_gallery(
    found: Sequence[Answer], kept: KeptEmbeddings, dataset: ShardedDataset, config: RunConfig, max_bytes: int
) -> Gallery:
    """The chosen queries with their results; once their media exceed `max_bytes`, samples are shown without."""
    cache: dict[int, SampleView] = {}
    spent = 0

    def view(row: int) -> SampleView:
        nonlocal spent
        if row not in cache:
            cache[row] = view_sample(dataset, int(kept.positions[row]), config)
        shown = cache[row]
        if spent + shown.num_bytes > max_bytes:
            return without_media(shown)
        spent += shown.num_bytes
        return shown

    queries = []
    for answer in choose(found):
        tiles = tuple(
            Tile(view=view(row), place=place, score=score, is_truth=row == answer.query)
            for place, (row, score) in enumerate(answer.best, start=1)
        )
        truth = None
        if not any(tile.is_truth for tile in tiles):
            truth = Tile(view=view(answer.query), place=answer.rank, score=answer.truth_score, is_truth=True)
        own = next(tile.view for tile in (*tiles, truth) if tile is not None and tile.is_truth)
        queries.append(GalleryQuery(view=own, rank=answer.rank, tiles=tiles, truth=truth))
    return Gallery(queries=tuple(queries), num_asked=len(found))
