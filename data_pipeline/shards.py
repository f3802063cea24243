"""The shard contract: what sharding writes and training reads. Disk is the border between the two halves.

A dataset folder holds

    dataset.json             schema version, counts, shards with hashes, config; written last
    shard-000042.tar         a standard WebDataset tar: KEY.mp4 | KEY.jpg, KEY.flac | KEY.opus, KEY.json
    shard-000042.parquet     one row a sample: member offsets and sizes, checksums, captions, durations
    shard-000042_01.tar ...  further tars of the same task, when the first was full
    rejects.parquet          one row for every manifest row or clip that is in no shard, with the reason
    tasks/                   the ledger: one record a finished task

A sample's member in slot `video` or `audio` is read by offset, without reading the tar before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tarfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.settings import UserError, nearest

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


@dataclass(kw_only=True)
class ShardWriter:
    """Write one tar and its index under temporary names; `close` makes both durable and gives them their names.

    Every header field is fixed (owner 0, time 0, mode 0644), so equal samples give equal bytes. Temporary names are
    random: a worker that outlives its killed run and the worker that replaces it never write into one file.
    """

    folder: Path
    name: str  # "shard-000042"
    split: str
    _rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tar_path = self.folder / f"{self.name}.tar"
        self._partial = partial_path(self._tar_path)
        self._tar = tarfile.open(self._partial, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed by close()

    @property
    def num_samples(self) -> int:
        """Samples written so far."""
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """Size of the tar so far, without its end-of-archive blocks."""
        return int(self._tar.offset)

    def write(self, sample: Sample) -> None:
        """Append the members of `sample`, next to each other, in the order of `SLOTS`."""
        row: dict[str, Any] = {"key": sample.key, "split": self.split, **sample.index}
        for slot in SLOTS:
            extension, data = sample.members.get(slot, (None, b""))
            if extension is None:
                continue
            assert extension in EXTENSIONS[slot], f"{extension} is no extension of slot {slot}"
            info = tarfile.TarInfo(f"{sample.key}.{extension}")
            info.size, info.mode = len(data), 0o644
            row[f"{slot}_ext"], row[f"{slot}_bytes"], row[f"{slot}_crc32"] = extension, len(data), zlib.crc32(data)
            row[f"{slot}_offset"] = self._tar.offset + tarfile.BLOCKSIZE
            self._tar.addfile(info, BytesIO(data))
        self._rows.append(row)

    def close(self) -> ShardInfo:
        """Finish both files, flush them to disk and rename them to their final names."""
        self._tar.close()
        index_path = self.folder / f"{self.name}.parquet"
        index_partial = partial_path(index_path)
        columns = {f.name: [row.get(f.name) for row in self._rows] for f in INDEX_SCHEMA}
        pq.write_table(pa.table(columns, schema=INDEX_SCHEMA), index_partial, compression="zstd")
        info = ShardInfo(
            path=self._tar_path.name,
            split=self.split,
            num_samples=self.num_samples,
            num_bytes=self._partial.stat().st_size,
            sha256=file_sha256(self._partial),
            index_path=index_path.name,
            index_bytes=index_partial.stat().st_size,
            index_sha256=file_sha256(index_partial),
        )
        publish(self._partial, self._tar_path)
        publish(index_partial, index_path)
        return info


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def partial_path(final: Path) -> Path:
    """A temporary name beside `final` that nobody else uses."""
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")


def publish(partial: Path, final: Path) -> None:
    """Flush `partial` to disk and rename it to `final`: at no moment is there half a file under the final name."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(partial, final)
    directory = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON under a temporary name, then publish it."""
    partial = partial_path(path)
    partial.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    publish(partial, path)


def read_dataset_json(folder: Path | str) -> dict[str, Any]:
    """The parsed `dataset.json` of a finished dataset.

    Raises:
        UserError: no such folder, no dataset in it, or a schema version this version does not read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"dataset {folder}: no such folder; expected the output of 'parallelotope shard'")
    path = folder / "dataset.json"
    if not path.is_file():
        if (folder / "plan").is_dir():
            raise UserError(f"dataset {folder}: no dataset.json: sharding has not finished; run 'parallelotope shard'")
        near = [place for place in (folder.parent, *sorted(folder.glob("*/"))) if (place / "dataset.json").is_file()]
        hint = f"did you mean {near[0]}?" if near else "expected the output of 'parallelotope shard'"
        raise UserError(f"dataset {folder}: no dataset.json, and nothing else that sharding writes; {hint}")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version = info["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"dataset {path}: not a dataset description ({error})") from error
    if version != SCHEMA_VERSION:
        raise UserError(f"dataset {path}: schema version {version} found, {SCHEMA_VERSION} expected: shard it again")
    assert isinstance(info, dict)
    return info


def sample_name(row: dict[str, Any]) -> str:
    """What a person calls a sample: the id of its manifest row, and which clip of that where it is not the first."""
    return row["row_id"] if row["clip_index"] == 0 else f"{row['row_id']} #{row['clip_index'] + 1}"


class ShardedDataset:
    """The samples of one split, by position: `index` is a table with a row a sample in shard order.

    Args:
        folder: a dataset folder.
        split: the split to read; None for all.

    Raises:
        UserError: no dataset, another schema version, or no such split.
    """

    def __init__(self, folder: Path | str, split: str | None = None, max_open_files: int = 64) -> None:
        self.folder = Path(folder)
        self.info = read_dataset_json(folder)
        self.split = split
        splits = {shard["split"] for shard in self.info["shards"]}
        if split is not None and split not in splits:
            raise UserError(f"dataset {folder}: no split '{split}'; {nearest(split, splits)}")
        self.shards = [ShardInfo(**s) for s in self.info["shards"] if split is None or s["split"] == split]
        self.shard_sizes = [shard.num_samples for shard in self.shards]
        tables = [pq.read_table(self.folder / shard.index_path, schema=INDEX_SCHEMA) for shard in self.shards]
        self.index: pa.Table = pa.concat_tables(tables).combine_chunks() if tables else INDEX_SCHEMA.empty_table()
        self._shard_of = [number for number, size in enumerate(self.shard_sizes) for _ in range(size)]
        self._max_open_files = max_open_files
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return int(self.index.num_rows)

    @property
    def digest(self) -> str:
        """A short hash of the shards' contents and order: equal digests, equal samples at equal positions."""
        text = "\n".join(f"{shard.split} {shard.sha256} {shard.index_sha256}" for shard in self.shards)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def row(self, position: int) -> dict[str, Any]:
        """The index row of the sample at `position`, a plain dict of the columns of `INDEX_SCHEMA`."""
        row = self.index.slice(position, 1).to_pylist()[0]
        assert isinstance(row, dict)
        return row

    def read_member(self, position: int, slot: str, row: dict[str, Any] | None = None) -> bytes | None:
        """The bytes of a sample's member in `slot`; None when the sample has none.

        Raises:
            DamagedMember: the file cannot be read, is too short, or the bytes fail their checksum.
        """
        row = self.row(position) if row is None else row
        if row[f"{slot}_ext"] is None:
            return None
        shard = self._shard_of[position]
        try:
            data = os.pread(self._descriptor(shard), row[f"{slot}_bytes"], row[f"{slot}_offset"])
        except OSError as error:
            raise DamagedMember(f"{self.shards[shard].path}: {error.strerror}") from error
        if zlib.crc32(data) != row[f"{slot}_crc32"]:
            raise DamagedMember(f"{self.shards[shard].path}: checksum of {row['key']}.{row[f'{slot}_ext']} differs")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= self._max_open_files:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = os.open(self.folder / self.shards[shard].path, os.O_RDONLY)
        return self._open[shard]

    def close(self) -> None:
        """Close the open tars."""
        while self._open:
            os.close(self._open.popitem()[1])
