"""Manifest in, dataset folder out: plan, run what is missing, put the records together."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.config import ShardConfig
from data_pipeline.dataset import assemble
from data_pipeline.manifest import read_manifest
from data_pipeline.plan import Task, extend_plan
from data_pipeline.progress import JobProgress, describe_rejects
from data_pipeline.ray_job import run_on_ray
from data_pipeline.settings import UserError
from data_pipeline.source import is_url
from data_pipeline.task import finished_record, remove_partials, run_task


@dataclass(frozen=True, kw_only=True)
class ShardingResult:
    """What a run did: how many tasks there are, how many of them it ran, and what failed (name: last error)."""

    num_tasks: int
    num_run: int
    failures: dict[str, str]


def shard_dataset(config: ShardConfig) -> ShardingResult:
    """Bring the dataset in `config.out_dir` up to its manifest; prints progress.

    Tasks that are done stay as they are. `dataset.json` is written when every task is done.

    Raises:
        UserError: a manifest or a folder that does not fit, or another run in the same folder.
    """
    if is_url(config.out_dir):
        raise UserError(f"out_dir {config.out_dir}: expected a folder of a file system that every worker mounts")
    manifest = read_manifest(config.manifest)
    folder = Path(config.out_dir).resolve()
    _make_folder(folder)
    with _alone_in(folder):
        remove_partials(folder)
        tasks = extend_plan(manifest.rows, config, folder)
        missing = [task for task in tasks if finished_record(folder, task) is None]
        num_missing = sum(len(task.rows) for task in missing)
        failures: dict[str, str] = {}
        with JobProgress("shard", "rows", num_missing, can_reject=True) as progress:
            progress.say(
                f"{len(manifest.rows)} rows in {config.manifest}: {len(tasks)} tasks, {len(tasks) - len(missing)} done"
            )
            if missing:
                base = manifest.base if is_url(manifest.base) else os.path.abspath(manifest.base)
                arguments = {"base": base, "config": config, "folder": folder}
                failures = run_on_ray(missing, _run, arguments, config.ray, _advance(progress))
        remove_partials(folder)
        if not failures:
            _finish(folder, tasks, config, num_run=len(missing))
    return ShardingResult(num_tasks=len(tasks), num_run=len(missing), failures=failures)


def _run(task: Task, base: str, config: ShardConfig, folder: Path) -> dict[str, Any]:
    """What a worker does; only what the progress shows goes back."""
    record = run_task(task, base, config, folder)
    return {"rejects_by_reason": record["rejects_by_reason"]}


def _advance(progress: JobProgress) -> Any:
    return lambda task, result: progress.advance(len(task.rows), result["rejects_by_reason"])


def _finish(folder: Path, tasks: list[Task], config: ShardConfig, num_run: int) -> None:
    records = [record for task in tasks if (record := finished_record(folder, task)) is not None]
    if len(records) != len(tasks):
        raise UserError(f"out_dir {folder}: files of finished tasks are gone or of another size; run the command again")
    written = assemble(folder, tasks, records, config.bytes_config())
    num_samples = sum(record["num_samples"] for record in records)
    num_shards = sum(len(record["shards"]) for record in records)
    rejects: dict[str, int] = {}
    for record in records:
        for reason, count in record["rejects_by_reason"].items():
            rejects[reason] = rejects.get(reason, 0) + count
    done = "nothing to do" if not written and num_run == 0 else "done"
    print(
        f"shard: {done}: {num_samples} clips in {num_shards} shards of {folder}; rejects: {describe_rejects(rejects)}"
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out_dir {folder}: cannot be made: {error.strerror}") from error
    if any(folder.glob("shard-*.tar")) and not (folder / "plan").is_dir():
        raise UserError(f"out_dir {folder}: holds shards without a plan; expected a folder of ours, or an empty one")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system gives back when the process ends in any way."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"out_dir {folder}: another 'parallelotope shard' is writing there") from error
        yield
