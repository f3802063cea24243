"""Re-read a dataset: every byte of every shard, and one outcome for every row and clip."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.dataset import describe_dataset, rejects_table
from data_pipeline.plan import Task, read_plan
from data_pipeline.progress import JobProgress
from data_pipeline.shards import INDEX_SCHEMA, REJECTS_SCHEMA, SLOTS, ShardInfo, file_sha256, read_dataset_json
from data_pipeline.task import read_record
from data_pipeline.whole_dataset import WholeDataset, whole_dataset


@dataclass(kw_only=True)
class Report:
    """What was counted and what is wrong, one line a problem."""

    counts: dict[str, int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def table(self) -> str:
        """The counts, one a line."""
        lines = [f"{name:<10}{count:>14,}" for name, count in self.counts.items()]
        return "\n".join([*lines, f"{'problems':<10}{len(self.problems):>14,}"])


def verify_dataset(location: Path | str) -> Report:
    """Check tars, indices, hashes, records, rejects and the ledger of the dataset in a folder or below a URL.

    Raises:
        UserError: there is no finished dataset of this schema version, or its store does not answer.
    """
    info = read_dataset_json(location)
    with whole_dataset(location) as dataset:
        return _verify(dataset, info)


def _verify(dataset: WholeDataset, info: dict[str, Any]) -> Report:
    folder = dataset.folder
    tasks, bytes_config = read_plan(folder)
    report = Report()
    records = []
    for task in tasks:
        record = read_record(folder, task)
        if record is None:
            report.problems.append(f"{task.name}: no record of this plan: its rows are not accounted for")
            continue
        records.append(record)
        report.problems += _ledger_problems(task, record)
    expected = describe_dataset(tasks, records, bytes_config or {})
    report.problems += [
        f"dataset.json: {key} differs from the records" for key in expected if info.get(key) != expected[key]
    ]
    report.problems += _rejects_problems(folder, info, records)
    with JobProgress("verify", "shards", sum(len(record["shards"]) for record in records)) as progress:
        for record in records:
            for shard in record["shards"]:
                report.problems += [
                    f"{shard['path']}: {line}" for line in _shard_problems(dataset, record, shard, report)
                ]
                progress.advance(1)
    known = {shard["path"] for record in records for shard in record["shards"]}
    report.problems += [f"{name}: in no record" for name in sorted(dataset.tar_names - known)]
    report.counts = {
        "rows": sum(len(task.rows) for task in tasks),
        "clips": sum(record["num_samples"] for record in records),
        "rejects": sum(len(record["rejects"]) for record in records),
        "shards": len(known),
        **report.counts,
    }
    return report


def _ledger_problems(task: Task, record: dict[str, Any]) -> Iterator[str]:
    """Every row has either one rejection, or one outcome for each of its clips 0, 1, ..."""
    outcomes: dict[str, list[int | None]] = {row.id: [] for row in task.rows}
    for outcome in (*record["samples"], *record["rejects"]):
        if outcome["row_id"] not in outcomes:
            yield f"{task.name}: an outcome of '{outcome['row_id']}', which is no row of the task"
        else:
            outcomes[outcome["row_id"]].append(outcome["clip_index"])
    for row_id, clips in outcomes.items():
        if not clips:
            yield f"{task.name}: row '{row_id}' has no outcome"
        elif clips != [None] and sorted(-1 if clip is None else clip for clip in clips) != list(range(len(clips))):
            yield f"{task.name}: row '{row_id}' has outcomes for clips {clips}; expected each clip once"
    if record["num_samples"] != len(record["samples"]) or record["num_rows"] != len(task.rows):
        yield f"{task.name}: the record's counts differ from its outcomes"


def _rejects_problems(folder: Path, info: dict[str, Any], records: list[dict[str, Any]]) -> Iterator[str]:
    try:
        stated = info["rejects"]
        path = folder / stated["path"]
        if file_sha256(path) != stated["sha256"]:
            yield f"{path.name}: SHA-256 differs from dataset.json"
        elif not pq.read_table(path, schema=REJECTS_SCHEMA).equals(rejects_table(records)):
            yield f"{path.name}: differs from the records"
    except (OSError, KeyError, TypeError, pa.ArrowException) as error:
        yield f"rejects.parquet: not readable: {error}"


def _shard_problems(
    dataset: WholeDataset, record: dict[str, Any], shard: dict[str, Any], report: Report
) -> Iterator[str]:
    info, index_path = ShardInfo(**shard), dataset.folder / shard["index_path"]
    try:
        with dataset.tar(info.path) as tar_path:
            for path, num_bytes, sha256 in (
                (tar_path, info.num_bytes, info.sha256),
                (index_path, info.index_bytes, info.index_sha256),
            ):
                found_bytes = path.stat().st_size
                report.counts["bytes"] = report.counts.get("bytes", 0) + found_bytes
                if found_bytes != num_bytes:
                    yield f"{path.name} has {found_bytes} bytes; expected {num_bytes}"
                elif file_sha256(path) != sha256:
                    yield f"SHA-256 of {path.name} differs from its record"
            rows = pq.read_table(index_path, schema=INDEX_SCHEMA).to_pylist()
            yield from _index_problems(rows, record, info)
            yield from _member_problems(tar_path, rows, report)
    except (OSError, pa.ArrowException, tarfile.TarError) as error:
        yield f"not readable: {' '.join(str(error).split())}"


def _index_problems(rows: list[dict[str, Any]], record: dict[str, Any], info: ShardInfo) -> Iterator[str]:
    """The index holds exactly the samples that the ledger puts into this shard, all of one split."""
    stated = Counter((s["row_id"], s["clip_index"]) for s in record["samples"] if s["shard"] == info.path)
    found = Counter((row["row_id"], row["clip_index"]) for row in rows)
    yield from (f"clip {clip} is in the ledger, not in the index" for clip in stated - found)
    yield from (f"clip {clip} is in the index, not in the ledger" for clip in found - stated)
    if len(rows) != info.num_samples:
        yield f"{len(rows)} samples in the index; expected {info.num_samples}"
    if {row["split"] for row in rows} - {info.split}:
        yield f"samples of another split than '{info.split}'"


def _member_problems(path: Path, rows: list[dict[str, Any]], report: Report) -> Iterator[str]:
    """Every member is where the index says, with the bytes that it says, and no other member is there."""
    expected = {
        f"{row['key']}.{row[f'{slot}_ext']}": (row, slot)
        for row in rows
        for slot in SLOTS
        if row[f"{slot}_ext"] is not None
    }
    seen: Counter[str] = Counter()
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            seen[member.name] += 1
            report.counts["members"] = report.counts.get("members", 0) + 1
            if member.name not in expected:
                yield f"{member.name} is in no row of the index"
                continue
            row, slot = expected[member.name]
            stream = tar.extractfile(member)
            data = b"" if stream is None else stream.read()
            if (member.offset_data, len(data)) != (row[f"{slot}_offset"], row[f"{slot}_bytes"]):
                yield f"{member.name} is not where the index says"
            if zlib.crc32(data) != row[f"{slot}_crc32"]:
                yield f"checksum of {member.name} differs"
            elif slot == "json" and not _describes(data, row):
                yield f"{member.name} differs from the index"
    yield from (f"{name} is missing" for name in expected if seen[name] == 0)
    yield from (f"{name} is there {count} times" for name, count in seen.items() if count > 1)


def _describes(data: bytes, row: dict[str, Any]) -> bool:
    values = json.loads(data)
    names = ("clip_index", "split", "weight", "start_s", "end_s", "captions", "subtitles")
    same = all(values[name] == row[name] for name in names)
    return same and values["id"] == row["row_id"] and values["metadata"] == json.loads(row["metadata"])
