"""One task: its rows become shards and, last of all, a record. A task is done when its record says so."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL
import pyarrow as pa

from data_pipeline.config import ShardConfig
from data_pipeline.extract import extract_row
from data_pipeline.filters import Rejection
from data_pipeline.plan import Task
from data_pipeline.shards import SCHEMA_VERSION, Sample, ShardInfo, ShardWriter, write_json

CONTENT = ("video", "audio", "captions", "subtitles")  # what a sample may have or lack


def run_task(task: Task, base: str, config: ShardConfig, folder: Path) -> dict[str, Any]:
    """Write the shards of `task` into `folder`, then its record, and return that.

    Raises:
        OSError: a failure of the machine (a full disk); nothing has its final name that is not whole.
    """
    remove_partials(folder, f".shard-{task.number:06d}")
    shards = _Shards(task, config, folder)
    outcomes: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    held: Counter[str] = Counter()
    for outcome in _outcomes(task, base, config):
        if isinstance(outcome, Rejection):
            rejects.append({**asdict(outcome), "reason": outcome.reason.value})
        else:
            row_id, clip_index = outcome.index["row_id"], outcome.index["clip_index"]
            held.update(name for name in CONTENT if outcome.members.get(name) or outcome.index.get(name))
            outcomes.append({"row_id": row_id, "clip_index": clip_index, "shard": shards.write(outcome)})
    record = {
        "schema_version": SCHEMA_VERSION,
        "task": task.number,
        "split": task.split,
        "digest": task.digest,
        "num_rows": len(task.rows),
        "num_samples": len(outcomes),
        "num_samples_with": {name: held[name] for name in CONTENT},
        "rejects_by_reason": dict(Counter(reject["reason"] for reject in rejects)),
        "shards": [asdict(shard) for shard in shards.close()],
        "samples": outcomes,
        "rejects": rejects,
        "libraries": libraries(),
    }
    record_path(folder, task.number).parent.mkdir(exist_ok=True)
    write_json(record_path(folder, task.number), record)
    return record


def _outcomes(task: Task, base: str, config: ShardConfig) -> Iterator[Sample | Rejection]:
    for row in task.rows:
        yield from extract_row(row, base, config)


class _Shards:
    """The tars of a task: `shard-000042.tar`, and `shard-000042_01.tar`, ... when one is full."""

    def __init__(self, task: Task, config: ShardConfig, folder: Path) -> None:
        self._task, self._config, self._folder = task, config, folder
        self._writer: ShardWriter | None = None
        self._done: list[ShardInfo] = []

    def write(self, sample: Sample) -> str:
        """Write `sample` and return the name of its tar."""
        if self._writer is not None and self._is_full(self._writer, sample):
            self._done.append(self._writer.close())
            self._writer = None
        if self._writer is None:
            number = len(self._done)
            name = f"shard-{self._task.number:06d}" + (f"_{number:02d}" if number else "")
            self._writer = ShardWriter(folder=self._folder, name=name, split=self._task.split)
        self._writer.write(sample)
        return f"{self._writer.name}.tar"

    def _is_full(self, writer: ShardWriter, sample: Sample) -> bool:
        num_bytes = writer.num_bytes + sum(len(data) for _, data in sample.members.values())
        too_many = writer.num_samples >= self._config.max_samples_per_shard
        return too_many or num_bytes > self._config.max_bytes_per_shard

    def close(self) -> list[ShardInfo]:
        """Finish the last tar and return all."""
        if self._writer is not None:
            self._done.append(self._writer.close())
            self._writer = None
        return self._done


def libraries() -> dict[str, str]:
    """The versions that decide which bytes are written."""
    ffmpeg = {
        name: ".".join(map(str, av.library_versions[name])) for name in ("libavcodec", "libavformat", "libswscale")
    }
    return {
        "av": av.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "pyarrow": pa.__version__,
        **ffmpeg,
    }


def record_path(folder: Path, number: int) -> Path:
    """Where the record of a task lies."""
    return folder / "tasks" / f"task-{number:06d}.json"


def read_record(folder: Path, task: Task) -> dict[str, Any] | None:
    """The record of `task`; None when there is none, or it is of another plan or not readable."""
    try:
        record = json.loads(record_path(folder, task.number).read_text(encoding="utf-8"))
        return record if record["digest"] == task.digest and record["schema_version"] == SCHEMA_VERSION else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def finished_record(folder: Path, task: Task) -> dict[str, Any] | None:
    """The record of `task` when every file that it names is there in the recorded size, else None."""
    record = read_record(folder, task)
    if record is None:
        return None
    for shard in record["shards"]:
        for path, num_bytes in ((shard["path"], shard["num_bytes"]), (shard["index_path"], shard["index_bytes"])):
            file = folder / path
            if not file.is_file() or file.stat().st_size != num_bytes:
                return None
    return record


def remove_partials(folder: Path, prefix: str = ".") -> int:
    """Remove what a killed run left half-written, and return the number of files."""
    stale = [path for place in (folder, folder / "plan", folder / "tasks") for path in place.glob(f"{prefix}*.partial")]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)
