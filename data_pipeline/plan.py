"""Manifest + configuration -> tasks: a pure division of rows that no number of workers can change.

The plan of a dataset folder is a list of generations, one file each in `plan/`. A manifest that grew adds a generation
of tasks for its new rows and moves no old one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.config import ShardConfig, digest_of
from data_pipeline.manifest_row import ManifestRow
from data_pipeline.settings import UserError
from data_pipeline.shards import SCHEMA_VERSION, partial_path, publish


@dataclass(frozen=True, kw_only=True)
class Task:
    """A unit of work: rows of one split, which become `shard-{number}.tar` and, when that is full, further ones.

    `digest` covers the rows and the configuration that decides bytes: equal digests, equal shards.
    """

    number: int
    split: str
    rows: tuple[ManifestRow, ...]
    digest: str

    @property
    def name(self) -> str:
        """The name in messages and of the task's record."""
        return f"task-{self.number:06d}"


def plan_tasks(rows: Sequence[ManifestRow], config: ShardConfig, first_number: int = 0) -> list[Task]:
    """Rows of each split, in order, `rows_per_task` at a time; splits in order of their first row."""
    by_split: dict[str, list[ManifestRow]] = {}
    for row in rows:
        by_split.setdefault(row.split, []).append(row)
    size = config.rows_per_task
    groups = [
        (split, tuple(members[begin : begin + size]))
        for split, members in by_split.items()
        for begin in range(0, len(members), size)
    ]
    return [
        _task(number, split, members, config.bytes_config())
        for number, (split, members) in enumerate(groups, first_number)
    ]


def _task(number: int, split: str, rows: tuple[ManifestRow, ...], bytes_config: dict[str, Any]) -> Task:
    digest = digest_of({"config": bytes_config, "split": split, "rows": [row.digest for row in rows]})
    return Task(number=number, split=split, rows=rows, digest=digest)


def extend_plan(rows: Sequence[ManifestRow], config: ShardConfig, folder: Path) -> list[Task]:
    """The tasks of every generation in `folder`, after the rows that no earlier one has became a new generation.

    Raises:
        UserError: the folder was written with another configuration, or rows in it were changed or taken away.
    """
    old_tasks, bytes_config = read_plan(folder)
    if bytes_config is not None and bytes_config != config.bytes_config():
        place, old, new = _first_difference(bytes_config, config.bytes_config())
        raise UserError(
            f"out_dir {folder}: was sharded with {place} {old}, the configuration says {new}; "
            "expected the same value, or another out_dir"
        )
    old_rows = {row.id: row.digest for task in old_tasks for row in task.rows}
    new_rows = {row.id: row.digest for row in rows}
    changed = [row_id for row_id, digest in old_rows.items() if new_rows.get(row_id, digest) != digest]
    gone = [row_id for row_id in old_rows if row_id not in new_rows]
    for what, ids in (("changed", changed), ("gone", gone)):
        if ids:
            raise UserError(
                f"manifest: {len(ids)} rows that {folder} already holds are {what} (the first: '{ids[0]}'); "
                "expected only new rows, under new ids, or another out_dir"
            )
    added = [row for row in rows if row.id not in old_rows]
    if not added:
        return old_tasks
    tasks = plan_tasks(added, config, first_number=len(old_tasks))
    _write_generation(folder, tasks, config)
    return [*old_tasks, *tasks]


def _first_difference(old: Any, new: Any, place: str = "") -> tuple[str, Any, Any]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{place}.{key}" if place else key)
    return place, json.dumps(old), json.dumps(new)


def _write_generation(folder: Path, tasks: Iterable[Task], config: ShardConfig) -> None:
    """One JSON line for the head, then one a task."""
    plan = folder / "plan"
    plan.mkdir(parents=True, exist_ok=True)
    path = plan / f"generation-{len(list(plan.glob('generation-*.jsonl'))):04d}.jsonl"
    partial = partial_path(path)
    with open(partial, "w", encoding="utf-8") as stream:
        stream.write(json.dumps({"schema_version": SCHEMA_VERSION, "config": config.bytes_config()}) + "\n")
        for task in tasks:
            rows = [row.to_json() for row in task.rows]
            stream.write(json.dumps({"number": task.number, "split": task.split, "rows": rows}) + "\n")
    publish(partial, path)


def read_plan(folder: Path) -> tuple[list[Task], dict[str, Any] | None]:
    """The tasks of all generations in order, and the byte-deciding configuration; no tasks and None before the first.

    Raises:
        UserError: a plan of another schema version, or one that cannot be read.
    """
    tasks: list[Task] = []
    bytes_config: dict[str, Any] | None = None
    for path in sorted((folder / "plan").glob("generation-*.jsonl")):
        try:
            with open(path, encoding="utf-8") as stream:
                head = json.loads(stream.readline())
                if head["schema_version"] != SCHEMA_VERSION:
                    raise UserError(
                        f"plan {path}: schema version {head['schema_version']} found, {SCHEMA_VERSION} expected: "
                        "shard into another out_dir"
                    )
                bytes_config = head["config"]
                for line in stream:
                    values = json.loads(line)
                    rows = tuple(ManifestRow.from_json(row) for row in values["rows"])
                    tasks.append(_task(values["number"], values["split"], rows, head["config"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"plan {path}: not readable ({error}); expected what 'parallelotope shard' wrote"
            ) from error
    return tasks, bytes_config


def rows_digest(tasks: Sequence[Task]) -> str:
    """SHA-256 over all rows of the plan, in order: what the dataset was made of."""
    return digest_of([row.digest for task in tasks for row in task.rows])
