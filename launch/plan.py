"""A job as data: which processes, with which arguments, environment and log files. Nothing here starts anything."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

EXIT_RUN_AGAIN = 75  # a rank leaves with it after a checkpoint on a signal: the same command continues the run


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan needs to know of the machine it is for."""

    host: str
    num_cores: int
    has_gpu: bool
    master_port: int  # free on 127.0.0.1


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One process. `env` is what it gets besides the environment of its launcher."""

    rank: int
    argv: tuple[str, ...]
    env: dict[str, str]
    log_path: Path  # appended to


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Processes of one job on this machine, in rank order."""

    ranks: tuple[RankPlan, ...]


def train_argv(python: str, config: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """The command of every rank: the same one that runs alone."""
    return (python, "-m", "pretrain.main", "pretrain", config, *overrides)


def local_plan(
    argv: Sequence[str], num_ranks: int, log_dir: Path, machine: Machine, environment: Mapping[str, str]
) -> Plan:
    """`num_ranks` processes of `argv` on this machine.

    Variables that choose the machine's resources (OMP_NUM_THREADS, DS_ACCELERATOR) are left alone where `environment`
    has them; those that say who a rank is always come from here.
    """
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(machine.master_port),
    }
    if not environment.get("OMP_NUM_THREADS"):
        shared["OMP_NUM_THREADS"] = str(max(1, machine.num_cores // num_ranks))
    if not machine.has_gpu and not environment.get("DS_ACCELERATOR"):
        shared["DS_ACCELERATOR"] = "cpu"
    return Plan(
        ranks=tuple(
            RankPlan(
                rank=rank,
                argv=tuple(argv),
                env={"RANK": str(rank), "LOCAL_RANK": str(rank), **shared},
                log_path=log_dir / f"{machine.host}-{rank}.log",
            )
            for rank in range(num_ranks)
        )
    )


def render(plan: Plan) -> str:
    """The plan as text: a line a rank that a POSIX shell would run, for people to read and copy."""
    lines = []
    for rank in plan.ranks:
        assignments = [f"{name}={shlex.quote(value)}" for name, value in sorted(rank.env.items())]
        lines.append(" ".join([*assignments, shlex.join(rank.argv), ">>", shlex.quote(str(rank.log_path))]))
    return "\n".join(lines) + "\n"
