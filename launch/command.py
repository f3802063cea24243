"""The `launch` commands: check the config, make a plan, run it. Without torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.settings import UserError, load_settings
from launch.local import run, this_machine
from launch.plan import EXIT_RUN_AGAIN, local_plan, render, train_argv
from pretrain.config import RunConfig
from pretrain.preflight import check_run


def local(
    config: Annotated[Path, typer.Argument(help="YAML of pretrain.config.RunConfig.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Keys to change: train.chunk=64 ...")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes; on GPUs, one each.")] = 1,
    dry_run: Annotated[bool, typer.Option(help="Print what would be started, and start nothing.")] = False,
) -> None:
    """Train the towers of CONFIG on several ranks of this machine; the same command resumes.

    Exit codes: 0 finished, 75 stopped on a signal with a checkpoint (run it again), 2 a mistake, else that of the
    first rank that failed (128 + its signal).
    """
    settings = load_settings(RunConfig, config, overrides or [])
    check_run(settings, ranks)
    machine = this_machine()
    log_dir = Path(settings.run_dir) / "logs"
    argv = train_argv(sys.executable, str(config), overrides or [])
    plan = local_plan(argv, ranks, log_dir, machine, os.environ)
    if dry_run:
        print(render(plan), end="")
        return
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir {settings.run_dir}: cannot be made: {error.strerror}") from error
    print(f"{ranks} ranks on {machine.host}, every rank's output in {log_dir}", file=sys.stderr, flush=True)
    code = run(plan)
    if code == EXIT_RUN_AGAIN:
        print("stopped with a checkpoint; the same command continues the run", file=sys.stderr)
    raise typer.Exit(code)
