"""Manifest in, dataset folder out: plan, run what is missing, put the records together."""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.config import ShardConfig
from data_pipeline.dataset import assemble
from data_pipeline.location import is_url
from data_pipeline.manifest import read_manifest
from data_pipeline.plan import Task, extend_plan
from data_pipeline.progress import JobProgress, counted, describe_rejects
from data_pipeline.ray_job import run_on_ray
from data_pipeline.settings import UserError
from data_pipeline.target_folder import check_target_folder
from data_pipeline.task import CONTENT, finished_record, remove_partials, run_task


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
    manifest = read_manifest(config.manifest, config.hold_out)
    folder = Path(config.out_dir).resolve()
    _make_folder(folder, config.manifest)
    with _alone_in(folder):
        remove_partials(folder)
        tasks = extend_plan(manifest.rows, config, folder)
        missing = [task for task in tasks if finished_record(folder, task) is None]
        num_missing = sum(len(task.rows) for task in missing)
        failures: dict[str, str] = {}
        with JobProgress("shard", "rows", num_missing, can_reject=True) as progress:
            rows, num_tasks = counted(len(manifest.rows), "row"), counted(len(tasks), "task")
            progress.say(f"{rows} in {config.manifest}: {num_tasks}, {len(tasks) - len(missing)} done")
            if manifest.metadata_columns:
                progress.say(f"other columns, carried along as metadata: {', '.join(manifest.metadata_columns)}")
            for remark in manifest.remarks:
                progress.say(f"remark: {remark}")
            if manifest.foreign_files:
                shown = ", ".join(manifest.foreign_files[:3]) + (", ..." if len(manifest.foreign_files) > 3 else "")
                num_foreign = counted(len(manifest.foreign_files), "file")
                progress.say(f"{num_foreign} beside no video, sound or picture of that name, not used: {shown}")
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
    done = "nothing to do" if not written and num_run == 0 else "done"
    _summarize(folder, records, done, config.manifest)


def _summarize(folder: Path, records: list[dict[str, Any]], done: str, manifest: str) -> None:
    """Print what the folder holds now.

    Raises:
        UserError: nothing, because every row was rejected.
    """
    num_samples = sum(record["num_samples"] for record in records)
    num_shards = sum(len(record["shards"]) for record in records)
    rejects: Counter[str] = Counter()
    for record in records:
        rejects.update(record["rejects_by_reason"])
    if num_samples == 0:
        first = next(reject for record in records for reject in record["rejects"])
        words = f"{describe_rejects(rejects)}; the first: row '{first['row_id']}', {first['detail']}"
        raise UserError(
            f"manifest {manifest}: no clip can be used: {words}; correct them and remove {folder}, where "
            "rejects.parquet has the others"
        )
    clips, shards = counted(num_samples, "clip"), counted(num_shards, "shard")
    print(f"shard: {done}: {clips} in {shards} of {folder}; rejects: {describe_rejects(rejects)}")
    held: Counter[str] = Counter()
    for record in records:
        held.update(record.get("num_samples_with", {}))
    if all("num_samples_with" in record for record in records):
        print(f"shard: of {clips} have {', '.join(f'{name} {held[name]}' for name in CONTENT)}")
    if rejects:
        print(f"shard: every reject with its reason: {folder / 'rejects.parquet'}")


def _make_folder(folder: Path, manifest: str) -> None:
    """The dataset's folder, made when it is not there.

    Raises:
        UserError: it holds other things, lies in the folder whose files are the rows, or cannot be made.
    """
    source = Path(manifest).resolve()
    if source.is_dir() and folder.is_relative_to(source):
        where = "the manifest's own folder" if folder == source else f"inside the manifest's folder {source}"
        raise UserError(f"out_dir {folder}: {where}, whose files are the rows; expected a folder outside of it")
    check_target_folder(folder, "out_dir", ("plan",), "one that 'parallelotope shard' wrote")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out_dir {folder}: cannot be made: {error.strerror}") from error


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system gives back when the process ends in any way."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"out_dir {folder}: another 'parallelotope shard' is writing there") from error
        yield
