"""What a sharded dataset holds, counted from its index and its table of rejects. Reads no media and needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.shards import ShardedDataset, read_file

NUM_EXAMPLES = 3  # of rejected rows, a reason


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Smallest, median, 95th percentile and largest of some numbers."""

    least: float
    median: float
    p95: float
    most: float

    @classmethod
    def of(cls, values: pa.ChunkedArray | pa.Array) -> Spread | None:
        """None where there are no values."""
        values = pc.drop_null(values)
        if not len(values):
            return None
        low, middle, high, top = pc.quantile(values, q=[0, 0.5, 0.95, 1]).to_pylist()
        return cls(least=low, median=middle, p95=high, most=top)


@dataclass(frozen=True, kw_only=True)
class SplitStatistics:
    """One split. Counts are of samples unless named otherwise."""

    split: str
    num_samples: int
    duration_s: Spread | None  # of clips
    total_s: float
    num_bytes: int  # of media members
    with_video: int  # moving pictures
    with_image: int  # a still picture instead
    with_audio: int
    with_text: int  # a caption that is not blank
    with_subtitles: int
    complete: int  # a picture of either kind, sound and text
    num_captions: int
    num_distinct_captions: int
    caption_words: Spread | None
    caption_sources: dict[str, int]
    height_px: Spread | None
    fps: Spread | None
    sample_rate_hz: Spread | None


@dataclass(frozen=True, kw_only=True)
class RejectStatistics:
    """One reason to reject: how often in each split, and the first rows it befell as "row id: detail"."""

    reason: str
    by_split: dict[str, int]
    examples: tuple[str, ...]

    @property
    def num_rejects(self) -> int:
        """In all splits together."""
        return sum(self.by_split.values())


@dataclass(frozen=True, kw_only=True)
class DatasetStatistics:
    """All splits in the order of the dataset, and rejects by reason, the commonest first."""

    splits: tuple[SplitStatistics, ...]
    rejects: tuple[RejectStatistics, ...]

    def to_json(self) -> dict[str, Any]:
        """A value that `json.dumps` takes."""
        return asdict(self)


def describe_dataset(location: Path | str) -> DatasetStatistics:
    """Statistics of a dataset in a folder or below a URL.

    Raises:
        UserError: no finished dataset there.
    """
    dataset = ShardedDataset(location)
    names = list(dict.fromkeys(shard.split for shard in dataset.shards))
    splits = [describe_split(name, dataset.index.filter(pc.equal(dataset.index["split"], name))) for name in names]
    return DatasetStatistics(splits=tuple(splits), rejects=tuple(_rejects(location)))


def describe_split(name: str, index: pa.Table) -> SplitStatistics:
    """Statistics of the rows of one split, a table by `INDEX_SCHEMA`."""
    durations = pc.subtract(index["end_s"], index["start_s"])
    video = pc.fill_null(pc.equal(index["video_ext"], "mp4"), False)
    image = pc.fill_null(pc.equal(index["video_ext"], "jpg"), False)
    audio = pc.is_valid(index["audio_ext"])
    texts, owners, sources = _captions(index)
    has_text = pc.is_in(pa.array(range(index.num_rows), pa.int64()), pc.unique(owners))
    sizes = [pc.sum(pc.fill_null(index[f"{slot}_bytes"], 0)).as_py() or 0 for slot in ("video", "audio")]
    return SplitStatistics(
        split=name,
        num_samples=index.num_rows,
        duration_s=Spread.of(durations),
        total_s=pc.sum(durations).as_py() or 0.0,
        num_bytes=sum(sizes),
        with_video=_count(video),
        with_image=_count(image),
        with_audio=_count(audio),
        with_text=_count(has_text),
        with_subtitles=_count(pc.greater(pc.list_value_length(index["subtitles"]), 0)),
        complete=_count(pc.and_(pc.and_(pc.or_(video, image), audio), has_text)),
        num_captions=len(texts),
        num_distinct_captions=len(pc.unique(texts)),
        caption_words=Spread.of(pc.list_value_length(pc.utf8_split_whitespace(texts))),
        caption_sources=dict(Counter(source or "unnamed" for source in sources.to_pylist()).most_common()),
        height_px=Spread.of(index["video_height_px"]),
        fps=Spread.of(index["video_fps"]),
        sample_rate_hz=Spread.of(index["audio_sample_rate_hz"]),
    )


def _captions(index: pa.Table) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Trimmed texts of all captions that are not blank, the row each belongs to, and its source."""
    lists = index["captions"].combine_chunks()
    flat = pc.list_flatten(lists)
    owners = pc.cast(pc.list_parent_indices(lists), pa.int64())
    texts = pc.utf8_trim_whitespace(pc.fill_null(pc.struct_field(flat, "text"), ""))
    kept = pc.greater(pc.utf8_length(texts), 0)
    return texts.filter(kept), owners.filter(kept), pc.struct_field(flat, "source").filter(kept)


def _count(mask: pa.ChunkedArray | pa.Array) -> int:
    return int(pc.sum(mask).as_py() or 0)


def _rejects(location: Path | str) -> Iterator[RejectStatistics]:
    try:
        data = read_file(location, "rejects.parquet")
    except FileNotFoundError:
        return
    rows = pq.read_table(pa.BufferReader(data)).to_pylist()
    for reason, _ in Counter(row["reason"] for row in rows).most_common():
        own = [row for row in rows if row["reason"] == reason]
        yield RejectStatistics(
            reason=reason,
            by_split=dict(Counter(row["split"] or "unknown" for row in own)),
            examples=tuple(f"{row['row_id']}: {row['detail']}" for row in own[:NUM_EXAMPLES]),
        )
