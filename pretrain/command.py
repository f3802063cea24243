"""The `pretrain` and `evaluate` commands. Everything that can be wrong without torch is found before it is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.settings import load_settings
from data_pipeline.shards import write_json
from pretrain.config import RunConfig
from pretrain.preflight import Accept, check_run, num_ranks, run_folder, with_accepted
from pretrain.signals import StopRequest


def pretrain(
    config: Annotated[Path, typer.Argument(help="YAML of pretrain.config.RunConfig.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys to change: train.chunk=64 ...; 'parallelotope keys pretrain' lists them."),
    ] = None,
    accept: Accept = None,
) -> None:
    """Train the towers of CONFIG on this rank; the same command resumes.

    Runs alone, or as one rank under torchrun, deepspeed, srun or `parallelotope launch`. Exit codes: 0 finished,
    75 stopped on a signal with a checkpoint (run it again), 2 a mistake, said in one line.
    """
    settings = load_settings(RunConfig, config, with_accepted(overrides, accept))
    check_run(settings, num_ranks())
    stop = StopRequest()  # before the imports, which take seconds
    from pretrain.ranks import join_ranks, leave_ranks

    world = join_ranks(settings.train.threads, settings.faults.stage_timeout_s)
    from pretrain.disk import full_disk_said
    from pretrain.memory import out_of_memory_said
    from pretrain.start_notes import compile_notes

    if world.rank == 0:
        for note in compile_notes():
            typer.echo(note, err=True)
    from pretrain.trainer import Trainer

    with out_of_memory_said(settings), full_disk_said(settings.run_dir):
        code = Trainer(settings, world, stop).run()
    leave_ranks(world, code)


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints.")],
    data: Annotated[str, typer.Option(help="A dataset folder or URL.")],
    split: Annotated[str, typer.Option(help="The split to evaluate.")] = "test",
    checkpoint: Annotated[str, typer.Option(help="best or last.")] = "best",
    workers: Annotated[int, typer.Option(help="Decoding processes.")] = 2,
) -> None:
    """Retrieval of a run on a split: a table, RUN/evaluation-SPLIT.json, and RUN/report.html with a gallery of it."""
    folder = run_folder(run, checkpoint)
    from rich.console import Console

    from pretrain.evaluate import evaluate_run
    from pretrain.kept_embeddings import embeddings_path

    report, source, kept = evaluate_run(run, data, split, checkpoint, workers)
    target = folder / f"evaluation-{split}.json"
    kept.save(embeddings_path(folder, target.stem))
    write_json(
        target,
        {"checkpoint": source.name, "step": kept.step, "data": data, "split": split, **report.to_json()},
    )
    console = Console()
    console.print(report.table(f"{run} ({source.name}) on {split}"))
    for warning in report.warnings:
        console.print(f"warning: {warning}", markup=False)
    console.print(f"written to {json.dumps(str(target))}", markup=False, highlight=False)
    from pretrain.report.command import refresh_page

    console.print(refresh_page(folder), markup=False, highlight=False, soft_wrap=True)
