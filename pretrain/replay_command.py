"""The command `parallelotope replay`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.settings import UserError, load_settings
from pretrain.config import RunConfig
from pretrain.preflight import check_run, run_folder


def replay(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    step: Annotated[int, typer.Option(min=1, help="The step to make again.")],
) -> None:
    """Make one recorded step of a run again, in this process, and print what each of its stages shows.

    Nothing is written into the run. The step is reached from the newest checkpoint before it: keep more of them
    (checkpoint.keep_every_steps) to get there faster.
    """
    folder = run_folder(run, "last")
    settings = load_settings(RunConfig, folder / "config.yaml")
    if step > settings.schedule.num_steps:
        raise UserError(f"--step {step}: expected one of 1 to {settings.schedule.num_steps}, the steps of {run}")
    settings = settings.model_copy(update={"run_dir": str(folder)})
    check_run(settings, 1)
    from rich.console import Console
    from rich.table import Table

    from pretrain.memory import out_of_memory_said
    from pretrain.ranks import join_ranks, leave_ranks
    from pretrain.replay import replay_step

    world = join_ranks(settings.train.threads, settings.faults.stage_timeout_s)
    if world.size > 1:
        raise UserError(f"replay runs in one process, found {world.size} ranks; start it without a launcher")
    with out_of_memory_said(settings):
        facts = replay_step(folder, settings, world, step, lambda line: print(line, file=sys.stderr, flush=True))
    table = Table("stage", "what", "value", title=f"{run}: step {step}", title_justify="left")
    stage = None
    for fact in facts:
        if fact.stage != stage and stage is not None:
            table.add_section()
        table.add_row(fact.stage if fact.stage != stage else "", fact.what, fact.value)
        stage = fact.stage
    Console(markup=False, highlight=False).print(table)
    leave_ranks(world, 0)
