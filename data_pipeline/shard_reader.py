"""Reading a finished dataset: its description, its index, and single members of its shards."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.location import dataset_name, is_url
from data_pipeline.settings import UserError, nearest
from data_pipeline.shard_cache import ShardCache
from data_pipeline.shard_schema import INDEX_SCHEMA, SCHEMA_VERSION, DamagedMember, ShardInfo
from data_pipeline.shard_store import NUM_CONNECTIONS, ShardUnavailable, open_files

MAX_COLUMNED = 256  # shards whose columns are held one by one


def read_file(location: Path | str, name: str) -> bytes:
    """A small file of a dataset in a folder or below a URL.

    Raises:
        UserError: no such folder, or a store that does not answer. FileNotFoundError: no such file there.
    """
    return open_files(location, None).read(name)


def read_dataset_json(location: Path | str) -> dict[str, Any]:
    """The parsed `dataset.json` of a finished dataset in a folder or below a URL.

    Raises:
        UserError: nothing there, no dataset in it, or a schema version this version does not read.
    """
    try:
        text = read_file(location, "dataset.json")
    except FileNotFoundError as error:
        raise UserError(f"dataset {location}: {_why_nothing(location)}") from error
    try:
        info = json.loads(text)
        version = info["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"dataset {location}: dataset.json is not a dataset description ({error})") from error
    if version != SCHEMA_VERSION:
        raise UserError(
            f"dataset {location}: schema version {version} found, {SCHEMA_VERSION} expected: shard it again"
        )
    assert isinstance(info, dict)
    return info


def _why_nothing(location: Path | str) -> str:
    """Why there is no dataset.json, and where one is near."""
    if is_url(str(location)):
        return "no dataset.json there; expected the output of 'parallelotope shard'"
    folder = Path(location)
    if (folder / "plan").is_dir():
        return "no dataset.json: sharding has not finished; run 'parallelotope shard'"
    near = [place for place in (folder.parent, *sorted(folder.glob("*/"))) if (place / "dataset.json").is_file()]
    hint = f"did you mean {near[0]}?" if near else "expected the output of 'parallelotope shard'"
    return f"no dataset.json, and nothing else that sharding writes; {hint}"


def sample_name(row: dict[str, Any]) -> str:
    """What a person calls a sample: the id of its manifest row, and which clip of that where it is not the first."""
    name: str = row["row_id"]
    return name if row["clip_index"] == 0 else f"{name} #{row['clip_index'] + 1}"


def shards_of(location: Path | str, split: str | None) -> list[ShardInfo]:
    """The shards of a split (None: of all) as `dataset.json` has them now.

    Raises:
        UserError: as `read_dataset_json`, or there is no such split.
    """
    shards = [ShardInfo(**shard) for shard in read_dataset_json(location)["shards"]]
    splits = {shard.split for shard in shards}
    if split is not None and split not in splits:
        raise UserError(f"dataset {location}: no split '{split}'; {nearest(split, splits)}")
    return [shard for shard in shards if split is None or shard.split == split]


def shards_digest(shards: Iterable[ShardInfo]) -> str:
    """A short hash of shards' contents and order: equal digests, equal samples at equal positions."""
    text = "\n".join(f"{shard.split} {shard.sha256} {shard.index_sha256}" for shard in shards)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ShardedDataset:
    """The samples of one split, by position: `index` is a table with a row a sample in shard order.

    Args:
        location: a dataset folder, or its fsspec URL.
        split: the split to read; None for all.
        shards: these, in this order, whatever the dataset holds by now; None: those it holds now.
        cache: for local copies of a URL's files; None: one in the user's cache folder.
        max_open_files: tars held open at once; None: 64, of a URL 8, since what is open cannot leave the cache.

    Raises:
        UserError: no dataset, another schema version, no such split, files that cannot be had from their store, or an
            index that is not the one of dataset.json.
    """

    def __init__(
        self,
        location: Path | str,
        split: str | None = None,
        *,
        shards: Sequence[ShardInfo] | None = None,
        cache: ShardCache | None = None,
        max_open_files: int | None = None,
    ) -> None:
        self.location = str(location)
        self.split = split
        self.shards = shards_of(location, split) if shards is None else list(shards)
        self.shard_sizes = [shard.num_samples for shard in self.shards]
        self._files = open_files(location, cache)
        places = zip(self.shards, self._files.indices(self.shards), strict=True)
        self._indices = [_read_index(self.location, shard, path) for shard, path in places]
        # In chunks: the strings of a large split are more than the 2 GiB that offsets of 32 bits can name.
        self.index: pa.Table = pa.concat_tables(self._indices) if self._indices else INDEX_SCHEMA.empty_table()
        self._shard_ends = list(accumulate(self.shard_sizes))
        self._max_open_files = max_open_files or (8 if self.is_remote else 64)
        self._open: OrderedDict[int, int] = OrderedDict()
        self._expected: list[int] = []
        self._columns: dict[int, list[tuple[str, pa.Array | pa.ChunkedArray]]] = {}

    def __len__(self) -> int:
        return int(self.index.num_rows)

    @property
    def name(self) -> str:
        """The last part of the location."""
        return dataset_name(self.location)

    @property
    def absolute_location(self) -> str:
        """The location, independent of the current folder."""
        return self.location if is_url(self.location) else str(Path(self.location).resolve())

    @property
    def is_remote(self) -> bool:
        """Whether tars are fetched before they are read."""
        return self._files.is_remote

    @property
    def digest(self) -> str:
        """`shards_digest` of this split."""
        return shards_digest(self.shards)

    def row(self, position: int) -> dict[str, Any]:
        """The index row of the sample at `position`, a plain dict of the columns of `INDEX_SCHEMA`."""
        shard = self._shard_of(position)
        place = position - self._shard_ends[shard] + self.shard_sizes[shard]
        return {name: column[place].as_py() for name, column in self._columns_of(shard)}

    def _columns_of(self, shard: int) -> list[tuple[str, pa.Array | pa.ChunkedArray]]:
        """The columns of a shard's index: a row of them takes a quarter of the time that one of a table takes."""
        if shard not in self._columns:
            if len(self._columns) >= MAX_COLUMNED:
                self._columns.clear()
            table = self._indices[shard]
            self._columns[shard] = [
                (name, column.chunk(0) if column.num_chunks == 1 else column)
                for name, column in zip(table.column_names, table.columns, strict=True)
            ]
        return self._columns[shard]

    def expect(self, positions: Iterable[int]) -> None:
        """Say which samples are read next, in this order: their shards are then fetched several at a time."""
        if self._files.is_remote:
            self._expected = list(dict.fromkeys(self._shard_of(position) for position in positions))

    def read_member(self, position: int, slot: str, row: dict[str, Any] | None = None) -> bytes | None:
        """The bytes of a sample's member in `slot`; None when the sample has none.

        Raises:
            DamagedMember: a local tar is gone or unreadable there, is too short, or the bytes fail their checksum.
            ShardUnavailable: the shard cannot be fetched or opened: no permission, too many open files, a file system
                that is away. That is not the sample's fault, and passes.
        """
        row = self.row(position) if row is None else row
        if row[f"{slot}_ext"] is None:
            return None
        shard = self._shard_of(position)
        try:
            data = _pread(self._descriptor(shard), row[f"{slot}_bytes"], row[f"{slot}_offset"])
        except OSError as error:
            said = f"{self.shards[shard].path}: {error.strerror}"
            if error.errno in (errno.ENOENT, errno.EIO) and not self._files.is_away():
                raise DamagedMember(said) from error
            raise ShardUnavailable(f"dataset {self.location}: {said}") from error
        if zlib.crc32(data) != row[f"{slot}_crc32"]:
            raise DamagedMember(f"{self.shards[shard].path}: checksum of {row['key']}.{row[f'{slot}_ext']} differs")
        return data

    def _shard_of(self, position: int) -> int:
        return bisect_right(self._shard_ends, position)

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= self._max_open_files:
            os.close(self._open.popitem(last=False)[1])
        if shard in self._expected:
            following = self._expected[self._expected.index(shard) :]
            self._files.fetch([self.shards[s] for s in following[:NUM_CONNECTIONS] if s not in self._open])
        self._open[shard] = self._files.open(self.shards[shard])
        return self._open[shard]

    def close(self) -> None:
        """Close the open tars."""
        while self._open:
            os.close(self._open.popitem()[1])


def _read_index(location: str, shard: ShardInfo, path: Path) -> pa.Table:
    """The index of a shard.

    Raises:
        UserError: it is not there, or is not the one that dataset.json means.
    """
    place = f"dataset {location}: index {shard.index_path}"
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != shard.index_sha256:
            raise UserError(f"{place}: its checksum is not that of dataset.json; copy the dataset again ({path})")
        return pq.read_table(pa.BufferReader(content), schema=INDEX_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{place}: cannot be read ({said}); copy the dataset again, or shard it again") from error


def _pread(descriptor: int, num_bytes: int, offset: int) -> bytes:
    """So many bytes, or those up to the end of the file: one call returns 2 GiB at most."""
    parts = []
    while num_bytes and (part := os.pread(descriptor, num_bytes, offset)):
        parts.append(part)
        num_bytes, offset = num_bytes - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
