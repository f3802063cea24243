"""Names, columns and types of the shard contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1
SLOTS = ("video", "audio", "json")
EXTENSIONS = {"video": ("mp4", "jpg"), "audio": ("flac", "opus"), "json": ("json",)}


def _member_fields(slot: str) -> list[pa.Field]:
    return [
        pa.field(f"{slot}_ext", pa.string()),
        pa.field(f"{slot}_offset", pa.int64()),
        pa.field(f"{slot}_bytes", pa.int64()),
        pa.field(f"{slot}_crc32", pa.uint32()),
    ]


INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("clip_index", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),  # of the clip, in the time of its source
        pa.field("end_s", pa.float64(), nullable=False),
        *(f for slot in SLOTS for f in _member_fields(slot)),
        pa.field("video_num_frames", pa.int32()),
        pa.field("video_fps", pa.float64()),
        pa.field("video_width_px", pa.int32()),
        pa.field("video_height_px", pa.int32()),
        pa.field("video_duration_s", pa.float64()),
        pa.field("audio_sample_rate_hz", pa.int32()),
        pa.field("audio_duration_s", pa.float64()),
        pa.field("captions", pa.list_(pa.struct([("text", pa.string()), ("source", pa.string())])), nullable=False),
        pa.field(
            "subtitles",
            pa.list_(pa.struct([("start_s", pa.float64()), ("end_s", pa.float64()), ("text", pa.string())])),
            nullable=False,
        ),
        pa.field("metadata", pa.string(), nullable=False),  # a JSON object: the manifest's other columns
    ]
)
REJECTS_SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("clip_index", pa.int32()),  # null: the whole row
        pa.field("split", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("task", pa.int32(), nullable=False),
    ]
)


class DamagedMember(Exception):
    """A member's bytes are not those that were written (checksum, length), or cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One clip, encoded, on its way into a shard.

    `members` maps a slot of `SLOTS` to (extension, bytes); `index` holds the remaining columns of `INDEX_SCHEMA`
    except offsets, sizes and checksums, which the writer knows.
    """

    key: str
    members: dict[str, tuple[str, bytes]]
    index: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """A finished shard: paths relative to the dataset folder, sizes and SHA-256 of the tar and of its index."""

    path: str
    split: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_path: str
    index_bytes: int
    index_sha256: str
