"""The `demo-corpus` command: write procedural clips, their manifest and the truth about the broken ones."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.demo_corpus.corpus import SPLITS, VERSION, Clip, plan, write_clip
from data_pipeline.progress import JobProgress
from data_pipeline.settings import UserError
from data_pipeline.shards import partial_path, publish

BATCH_CLIPS = 16


def demo_corpus(
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")],
    clips: Annotated[int, typer.Option(min=20, help="Training clips; validation and test clips are added.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal files.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Write procedural video clips with sound and captions (mp4, JSONL manifest); run again to add what is missing."""
    write_corpus(folder, clips, seed, workers)


def write_corpus(folder: Path, num_clips: int, seed: int, workers: int, splits: Sequence[str] = SPLITS) -> None:
    """Write the corpus, or the clips of some splits only; what is there already is kept.

    Raises:
        UserError: the folder holds a corpus of another size or seed, or cannot be written to.
    """
    wanted = {"clips": num_clips, "seed": seed, "version": VERSION}
    note = folder / "corpus.json"
    if note.is_file() and (found := json.loads(note.read_text())) != wanted:
        raise UserError(
            f"demo corpus {folder}: holds {found}, expected {wanted}: use another folder or the same numbers"
        )
    clips = [clip for clip in plan(num_clips, seed) if clip.split in splits]
    broken = {clip.id: clip.breakage for clip in clips if clip.breakage is not None}
    rows = "".join(json.dumps(clip.manifest_row()) + "\n" for clip in clips)
    try:
        (folder / "clips").mkdir(parents=True, exist_ok=True)
        _write_text(note, json.dumps(wanted) + "\n")
        _write_clips(folder, clips, seed, workers)
        _write_text(folder / "broken.json", json.dumps(broken, indent=1) + "\n")
        _write_text(folder / "manifest.jsonl", rows)  # last: where it is, every clip is
    except OSError as error:
        raise UserError(f"demo corpus {folder}: cannot be written: {error}") from error
    print(f"{len(clips)} clips in {folder}; manifest {folder / 'manifest.jsonl'}")


def _write_clips(folder: Path, clips: list[Clip], seed: int, workers: int) -> None:
    """Draw the clips whose files are not there yet, in `workers` processes."""
    there = {entry.name for entry in os.scandir(folder / "clips")}
    absent = [clip for clip in clips if clip.breakage != "missing" and Path(clip.video).name not in there]
    if not absent:
        return
    batches = [absent[start : start + BATCH_CLIPS] for start in range(0, len(absent), BATCH_CLIPS)]
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        jobs = [pool.submit(_write_batch, folder, batch, seed) for batch in batches]
        with JobProgress("demo-corpus", "clips", len(absent)) as progress:
            for job in as_completed(jobs):
                progress.advance(job.result())
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure, what has not begun never does


def _write_batch(folder: Path, clips: list[Clip], seed: int) -> int:
    for clip in clips:
        write_clip(folder, clip, seed)
    return len(clips)


def _write_text(path: Path, text: str) -> None:
    """Make `path` hold `text`, by a rename; a file that holds it already is left alone."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8")
    publish(partial, path)
