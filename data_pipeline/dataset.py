"""The records of all tasks become `dataset.json` and `rejects.parquet`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.plan import Task, rows_digest
from data_pipeline.shards import REJECTS_SCHEMA, SCHEMA_VERSION, file_sha256, partial_path, publish, write_json


def assemble(folder: Path, tasks: Sequence[Task], records: Sequence[dict[str, Any]], config: dict[str, Any]) -> bool:
    """Write both files from the records of all tasks, in order; False when they are there already, word for word.

    Args:
        config: the part of the configuration that decides bytes.
    """
    path = folder / "rejects.parquet"
    partial = partial_path(path)
    pq.write_table(rejects_table(records), partial, compression="zstd")
    rejects = {"path": path.name, "num_bytes": partial.stat().st_size, "sha256": file_sha256(partial)}
    info = describe_dataset(tasks, records, config) | {"rejects": rejects}
    if path.is_file() and file_sha256(path) == rejects["sha256"] and _read(folder / "dataset.json") == info:
        partial.unlink()
        return False
    publish(partial, path)
    write_json(folder / "dataset.json", info)
    return True


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def rejects_table(records: Sequence[dict[str, Any]]) -> pa.Table:
    """Every rejection of every record, by `REJECTS_SCHEMA`."""
    rows = [
        {**reject, "split": record["split"], "task": record["task"]}
        for record in records
        for reject in record["rejects"]
    ]
    return pa.Table.from_pylist(rows, schema=REJECTS_SCHEMA)


def describe_dataset(
    tasks: Sequence[Task], records: Sequence[dict[str, Any]], config: dict[str, Any]
) -> dict[str, Any]:
    """What `dataset.json` says, but for the rejects file; nothing in it depends on when or where it was made."""
    splits: dict[str, dict[str, int]] = {}
    rejects: Counter[str] = Counter()
    versions: dict[str, set[str]] = {}
    for record in records:
        counts = splits.setdefault(record["split"], {"num_rows": 0, "num_samples": 0, "num_shards": 0, "num_bytes": 0})
        counts["num_rows"] += record["num_rows"]
        counts["num_samples"] += record["num_samples"]
        counts["num_shards"] += len(record["shards"])
        counts["num_bytes"] += sum(shard["num_bytes"] for shard in record["shards"])
        rejects.update(record["rejects_by_reason"])
        for name, version in record["libraries"].items():
            versions.setdefault(name, set()).add(version)
    return {
        "schema_version": SCHEMA_VERSION,
        "num_rows": sum(counts["num_rows"] for counts in splits.values()),
        "num_samples": sum(counts["num_samples"] for counts in splits.values()),
        "num_rejects": sum(rejects.values()),
        "splits": splits,
        "rejects_by_reason": dict(rejects),
        "shards": [shard for record in records for shard in record["shards"]],
        "config": config,
        "manifest_digest": rows_digest(tasks),
        "libraries": {name: sorted(found) for name, found in sorted(versions.items())},
    }
