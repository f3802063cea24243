"""The Parquet dataset of embeddings that `parallelotope embed` writes.

    OUT/part-000000000-000008192.parquet   the rows of these samples; the name says which
    OUT/_problems.parquet                  the members that could not be read (readers of the dataset skip this name)

Columns: key, row_id, clip_index, split; a list of D floats for each modality, null where the sample has none; and
`problems`, which tells "has none" from "could not be read". A part appears by a rename, whole, and its metadata says
which model, dataset and split it belongs to: that is how a finished part is recognised.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float
from torch import Tensor

from data_pipeline.settings import UserError
from data_pipeline.shards import partial_path, publish

METADATA_KEY = b"parallelotope"
FORMAT_VERSION = 1
PROBLEMS = "_problems.parquet"
PROBLEM = pa.struct([("modality", pa.string()), ("reason", pa.string())])
SAMPLE_COLUMNS = ("key", "row_id", "clip_index", "split")
Span = tuple[int, int]  # first sample and the one after the last


@dataclass(frozen=True, kw_only=True)
class TableIdentity:
    """What a part belongs to. Digests are those of `export_digest` and of the dataset split."""

    export: str
    dataset: str
    split: str | None  # None: all
    modalities: tuple[str, ...]
    embedding_dim: int
    format_version: int = FORMAT_VERSION


def table_schema(identity: TableIdentity) -> pa.Schema:
    """Columns and metadata of a part."""
    vector = pa.list_(pa.float32(), identity.embedding_dim)
    fields = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("clip_index", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        *(pa.field(name, vector) for name in identity.modalities),
        pa.field("problems", pa.list_(PROBLEM), nullable=False),
    ]
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(asdict(identity), sort_keys=True).encode()})


def part_path(folder: Path, span: Span) -> Path:
    """The file of these samples; names sort as samples do."""
    return folder / f"part-{span[0]:09d}-{span[1]:09d}.parquet"


def finished_parts(folder: Path, identity: TableIdentity) -> list[Span]:
    """The parts of this table that are there, in order.

    Raises:
        UserError: parts of another model, dataset or split, or of something else altogether.
    """
    spans = []
    for path in sorted(folder.glob("part-*.parquet")):
        name = re.fullmatch(r"part-(\d+)-(\d+)\.parquet", path.name)
        try:
            metadata = (pq.read_schema(path).metadata or {}).get(METADATA_KEY, b"null")
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"--out {path}: cannot be read ({str(error).splitlines()[0]}); delete it") from error
        found = json.loads(metadata)
        wanted = json.loads(json.dumps(asdict(identity)))
        if name is None or not isinstance(found, dict) or found != wanted:
            there = found if isinstance(found, dict) else {}
            changed = [key for key in wanted if there.get(key) != wanted[key]]
            raise UserError(f"--out {path}: embeddings of another {' and '.join(changed)}; expected a new folder")
        spans.append((int(name[1]), int(name[2])))
    return spans


def missing_spans(num_samples: int, finished: Sequence[Span], max_rows: int) -> list[Span]:
    """The parts that are still to be made, none longer than `max_rows`."""
    missing, position = [], 0
    for first, stop in [*sorted(finished), (num_samples, num_samples)]:
        missing += [(start, min(start + max_rows, first)) for start in range(position, first, max_rows)]
        position = max(position, stop)
    return missing


def vector_column(rows: Float[Tensor, "samples dim"], present: Bool[Tensor, " samples"]) -> pa.Array:
    """A list of D floats a row, null where not present."""
    flat = np.ascontiguousarray(rows.numpy(), dtype=np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), rows.shape[1], mask=pa.array(~present.numpy()))


def write_part(folder: Path, span: Span, table: pa.Table) -> None:
    """Write a part under a temporary name, then give it its own."""
    final = part_path(folder, span)
    partial = partial_path(final)
    try:
        pq.write_table(table, partial, compression="zstd")
        publish(partial, final)
    except OSError as error:
        raise UserError(f"--out {final}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_problems(folder: Path) -> pa.Table:
    """Collect what could not be read from all parts into one file; returns it: key, modality, reason."""
    tables = [pq.read_table(path, columns=["key", "problems"]) for path in sorted(folder.glob("part-*.parquet"))]
    listed = [
        {"key": row["key"], **problem}
        for table in tables
        for row in table.filter(pc.greater(pc.list_value_length(table["problems"]), 0)).to_pylist()
        for problem in row["problems"]
    ]
    schema = pa.schema([("key", pa.string()), *((field.name, field.type) for field in PROBLEM)])
    found = pa.Table.from_pylist(listed, schema=schema)
    partial = partial_path(folder / PROBLEMS)
    pq.write_table(found, partial)
    publish(partial, folder / PROBLEMS)
    return found
