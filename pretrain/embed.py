"""Embed a sharded dataset with an exported model, in one process or several, into Parquet.

The samples that are still missing are cut into parts and dealt to the processes. accelerate says which process this is
and on which device it computes, whoever started it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.settings import UserError
from data_pipeline.shards import ShardedDataset
from data_pipeline.target_folder import check_target_folder
from pretrain.data.batch import Batch
from pretrain.data.reader import BatchReader
from pretrain.data.workers import BatchStream
from pretrain.embedding_table import (
    PROBLEM,
    PROBLEMS,
    SAMPLE_COLUMNS,
    Span,
    TableIdentity,
    finished_parts,
    missing_spans,
    table_schema,
    vector_column,
    write_part,
    write_problems,
)
from pretrain.export_format import check_weights, export_digest, read_export_config
from pretrain.inference import Model, load_model

MAX_PART_ROWS = 8192  # some 50 MB of three modalities with 512 dimensions
PARTS_A_PROCESS = 4  # at least, where there are batches enough: what a kill costs at most is one of them
PREFETCH_BATCHES = 2
PLAIN_EVERY_S = 10.0
CHECK_S = 0.5  # how often processes look whether the others live


@dataclass(frozen=True, kw_only=True)
class EmbedJob:
    """What to embed with what, and where to: the options of `parallelotope embed`."""

    export: Path
    data: str
    split: str | None
    out: Path
    batch_size: int
    workers: int


def embed_dataset(job: EmbedJob, processes: int) -> None:
    """Make what is missing in `job.out`, here or in `processes` new processes.

    Mistakes are found here, before any other process is started.

    Raises:
        UserError: no export, dataset or split, an output folder that holds something else, or a process that failed.
    """
    dataset, identity = _open(job)
    if "LOCAL_RANK" in os.environ:  # one of several processes already, and the weights are checked when loaded
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        _embed_share(job, dataset, identity)
        return
    spans = _missing(job, dataset, identity, processes)
    if processes == 1 or not spans:
        _embed_share(job, dataset, identity)
        return
    check_weights(job.export, read_export_config(job.export))
    code = _run_processes(job, processes)
    if code:
        raise UserError(f"embed: a process failed (exit code {code}, its words are above); run again to go on")


def _run_processes(job: EmbedJob, processes: int) -> int:
    """This command in `processes` processes that find each other; the exit code of the first that failed, or 0."""
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise UserError(f"--processes {processes}: expected at most {torch.cuda.device_count()}, one for each GPU")
    command = [sys.executable, "-m", "pretrain.main", "embed", str(job.export), "--data", job.data]
    command += ["--out", str(job.out), "--batch", str(job.batch_size), "--workers", str(job.workers)]
    command += [] if job.split is None else ["--split", job.split]
    environment = os.environ | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(number), "LOCAL_RANK": str(number)})
        for number in range(processes)
    ]
    try:
        codes = [rank.poll() for rank in ranks]
        while None in codes and not any(codes):
            time.sleep(CHECK_S)
            codes = [rank.poll() for rank in ranks]
        return next((code for code in codes if code), 0)
    finally:  # also on Ctrl-C; what ends this process otherwise ends them through `_end_with`
        for rank in ranks:
            rank.terminate()
        for rank in ranks:
            rank.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(CHECK_S)
    os._exit(1)


def _open(job: EmbedJob) -> tuple[ShardedDataset, TableIdentity]:
    config = read_export_config(job.export)
    dataset = ShardedDataset(job.data, job.split)
    if not len(dataset):
        raise UserError(f"dataset {job.data}: no samples")
    check_target_folder(job.out, "--out", ("part-*.parquet", PROBLEMS), "one that 'parallelotope embed' wrote")
    try:
        job.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {job.out}: cannot be made: {error.strerror}") from error
    identity = TableIdentity(
        export=export_digest(job.export), dataset=dataset.digest, split=job.split, modalities=config.modalities,
        embedding_dim=config.embedding_dim,
    )  # fmt: skip
    return dataset, identity


def _missing(job: EmbedJob, dataset: ShardedDataset, identity: TableIdentity, processes: int) -> list[Span]:
    """The parts to be made: cut so that all processes have work, in whole batches."""
    finished = finished_parts(job.out, identity)
    share = -(-len(dataset) // (processes * PARTS_A_PROCESS))
    rows = min(MAX_PART_ROWS, max(1, -(-share // job.batch_size)) * job.batch_size)
    return missing_spans(len(dataset), finished, rows)


def _embed_share(job: EmbedJob, dataset: ShardedDataset, identity: TableIdentity) -> None:
    """This process's parts; the main process then says what there is."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        # Planned by one: what others finish meanwhile must not change what is missing.
        plan = [_missing(job, dataset, identity, state.num_processes) if state.is_main_process else None]
        broadcast_object_list(plan)
        spans: list[Span] = plan[0] or []
        own = spans[state.process_index :: state.num_processes]
        if own:
            _embed_parts(job, dataset, identity, own, state.device, show=state.is_main_process)
        state.wait_for_everyone()
        if state.is_main_process:
            _say_result(job, dataset, identity, sum(stop - first for first, stop in spans))
    finally:
        dataset.close()
    if state.num_processes > 1:
        state.destroy_process_group()


def _embed_parts(
    job: EmbedJob, dataset: ShardedDataset, identity: TableIdentity, spans: list[Span], device: torch.device, show: bool
) -> None:
    model = load_model(job.export, device)
    reader = BatchReader(dataset, model.config.towers, model.config.window_s, augment=None, seed=0)
    stops = {start: stop for first, last in spans for start, stop in _batches(first, last, job.batch_size)}

    def read(position: int, check: Any) -> Batch:
        stop = stops[position]
        return reader.read(range(position, stop), [0] * (stop - position), position, stop, check)

    stream = BatchStream(reader, read, list(stops), min(job.workers, len(stops)), PREFETCH_BATCHES)
    try:
        batches = _told(stream, sum(stop - first for first, stop in spans)) if show else stream
        for first, last in spans:
            tables = [
                _embed_batch(model, dataset, next(batches), identity) for _ in _batches(first, last, job.batch_size)
            ]
            write_part(job.out, (first, last), pa.concat_tables(tables).combine_chunks())
    finally:
        stream.close()


def _batches(first: int, last: int, size: int) -> list[Span]:
    return [(start, min(start + size, last)) for start in range(first, last, size)]


@torch.no_grad()
def _embed_batch(model: Model, dataset: ShardedDataset, batch: Batch, identity: TableIdentity) -> pa.Table:
    """The rows of a batch."""
    inputs, present = batch.chunk(0, batch.num_samples, model.device)
    vectors = model.towers(inputs, present)
    problems: dict[str, list[dict[str, str]]] = {key: [] for key in batch.keys}
    for event in batch.events:
        problems[event.key].append({"modality": event.modality, "reason": event.reason})
    samples = dataset.index.slice(batch.position, batch.num_samples)
    columns = [samples[name].combine_chunks() for name in SAMPLE_COLUMNS]
    columns += [vector_column(vectors[name].float().cpu(), batch.present[name]) for name in identity.modalities]
    columns += [pa.array(problems.values(), type=pa.list_(PROBLEM))]
    return pa.table(columns, schema=table_schema(identity))


def _told(stream: Iterator[Batch], num_samples: int) -> Iterator[Batch]:
    """The same batches; how far they are is shown as a bar on a terminal, as a line now and then elsewhere."""
    console = Console()
    done, printed_s = 0, time.monotonic()
    columns = (TextColumn("embed (samples of process 0)"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=num_samples)
        for batch in stream:
            yield batch
            done += batch.num_samples
            bar.update(task, completed=done)
            if not console.is_terminal and time.monotonic() - printed_s > PLAIN_EVERY_S:
                printed_s = time.monotonic()
                print(f"embed: {done} of {num_samples} samples of process 0", flush=True)


def _say_result(job: EmbedJob, dataset: ShardedDataset, identity: TableIdentity, num_new: int) -> None:
    parts, problems = len(finished_parts(job.out, identity)), write_problems(job.out)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"embed: {len(dataset)} samples in {parts} parts in {job.out}, {num_new} of them new")
    for name in identity.modalities:
        mine = problems.filter(pc.equal(problems["modality"], name))
        if len(mine):
            example = mine.slice(0, 1).to_pylist()[0]
            console.print(
                f"embed: {name} of {len(mine)} samples cannot be read, for example {example['key']}: "
                f"{example['reason']}; all in _problems.parquet"
            )
