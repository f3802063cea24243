"""The commands `launch local` and `launch node`: check the config, make a plan, run it. Without torch."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.settings import UserError, load_settings
from launch.failures import LIFE, Failure, current_life, record_failure
from launch.local import run, this_machine
from launch.plan import EXIT_RUN_AGAIN, local_plan, node_plan, render, train_argv
from launch.rendezvous import check_meeting_point, describe, place_of_this_node, say
from pretrain.config import RunConfig
from pretrain.preflight import Accept, check_run, with_accepted

ConfigPath = Annotated[Path, typer.Argument(help="YAML of pretrain.config.RunConfig.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Keys to change: train.chunk=64 ...; 'parallelotope keys pretrain' lists them."),
]


def local(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes; on GPUs, one each.")] = 1,
    accept: Accept = None,
    dry_run: Annotated[bool, typer.Option(help="Print what would be started, and start nothing.")] = False,
) -> None:
    """Train the towers of CONFIG on several ranks of this machine; the same command resumes.

    Exit codes: 0 finished, 75 stopped on a signal with a checkpoint (run it again), 2 a mistake, else that of the
    first rank that failed (128 + its signal).
    """
    changes = with_accepted(overrides, accept)
    settings = load_settings(RunConfig, config, changes)
    check_run(settings, ranks)
    machine = this_machine()
    log_dir = Path(settings.run_dir) / "logs"
    argv = train_argv(sys.executable, str(config), changes)
    plan = local_plan(argv, ranks, log_dir, machine, os.environ)
    if dry_run:
        print(render(plan), end="")
        return
    make_folder(log_dir, settings.run_dir)
    say(f"{ranks} ranks on {machine.host}, every rank's output in {log_dir}")
    code = run(plan, Path(settings.run_dir))
    if code == EXIT_RUN_AGAIN:
        say("stopped; the same command continues the run")
    raise typer.Exit(code)


def node(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines of the job.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Processes a machine; on GPUs, one each.")] = 1,
    node_rank: Annotated[int | None, typer.Option(help="Which machine this is; default: srun's or the pod's.")] = None,
    master_host: Annotated[str | None, typer.Option(help="Machine of rank 0; default: srun's first.")] = None,
    master_port: Annotated[int | None, typer.Option(help="Default: from the job's id.")] = None,
    interface: Annotated[str | None, typer.Option(help="For gloo, where host names lead to 127.x.")] = None,
) -> None:
    """Train on this machine's share of the ranks; batch scripts call it once on each machine.

    Exit codes as of `launch local`.
    """
    settings = load_settings(RunConfig, config, overrides or [])
    place = place_of_this_node(nodes, ranks_per_node, node_rank, master_host, master_port, interface, os.environ)
    log_dir = Path(settings.run_dir) / "logs" / os.environ.get(LIFE, "")
    argv = train_argv(sys.executable, str(config), overrides or [])
    with _mistakes_recorded(Path(settings.run_dir), place.node * ranks_per_node):
        check_run(settings, nodes * ranks_per_node)
        check_meeting_point(place)
        make_folder(log_dir, settings.run_dir)
        say(describe(place))
        code = run(node_plan(argv, place, log_dir, this_machine(), os.environ), Path(settings.run_dir))
    raise typer.Exit(code)


@contextmanager
def _mistakes_recorded(run_dir: Path, first_rank: int) -> Iterator[None]:
    """In a job of several launchers, keep what stops this one: data that is not mounted here, a port that is taken."""
    try:
        yield
    except UserError as error:
        if LIFE in os.environ:
            failure = Failure(
                life=current_life(), rank=first_rank, host=socket.gethostname(), code=2, how="could not be started",
                time_s=time.time(), last_lines=tuple(str(error).splitlines()),
            )  # fmt: skip
            record_failure(run_dir, failure)
        raise


def make_folder(folder: Path, run_dir: str) -> None:
    """Make a folder inside the run's.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir {run_dir}: cannot be made: {error.strerror}") from error
