"""Writing one shard."""

from __future__ import annotations

import tarfile
import zlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.published_file import file_sha256, partial_path, publish
from data_pipeline.shard_schema import EXTENSIONS, INDEX_SCHEMA, SLOTS, Sample, ShardInfo


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
