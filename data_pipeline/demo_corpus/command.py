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

from data_pipeline.demo_corpus.corpus import VERSION, Clip, plan, write_clip
from data_pipeline.progress import JobProgress
from data_pipeline.settings import UserError
from data_pipeline.shards import write_json

BATCH_CLIPS = 16


def demo_corpus(
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")],
    clips: Annotated[int, typer.Option(min=20, help="Training clips; validation and test clips are added.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal files.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Write procedural video clips with sound and captions (mp4, JSONL manifest); run again to add what is missing."""
    write_corpus(folder, clips, seed, workers)


def write_corpus(folder: Path, num_clips: int, seed: int, workers: int, splits: Sequence[str] | None = None) -> None:
    """Write the corpus, or the clips of some of corpus.SPLITS only.

    Raises:
        UserError: the folder holds a corpus of another size or seed.
    """
    wanted = {"clips": num_clips, "seed": seed, "version": VERSION}
    note = folder / "corpus.json"
    if note.is_file() and (found := json.loads(note.read_text())) != wanted:
        raise UserError(
            f"demo corpus {folder}: holds {found}, expected {wanted}: use another folder or the same numbers"
        )
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    write_json(note, wanted)
    clips = [clip for clip in plan(num_clips, seed) if splits is None or clip.split in splits]
    batches = [clips[start : start + BATCH_CLIPS] for start in range(0, len(clips), BATCH_CLIPS)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = [pool.submit(_write_batch, folder, batch, seed) for batch in batches]
        with JobProgress("demo-corpus", "clips", len(clips)) as progress:
            for job in as_completed(jobs):
                progress.advance(job.result())
    write_json(folder / "broken.json", {clip.id: clip.breakage for clip in clips if clip.breakage is not None})
    manifest = folder / "manifest.jsonl"
    partial = manifest.with_name(".manifest.jsonl.partial")
    partial.write_text("".join(json.dumps(clip.manifest_row()) + "\n" for clip in clips), encoding="utf-8")
    os.replace(partial, manifest)
    print(f"{len(clips)} clips in {folder}; manifest {manifest}")


def _write_batch(folder: Path, clips: list[Clip], seed: int) -> int:
    for clip in clips:
        write_clip(folder, clip, seed)
    return len(clips)
