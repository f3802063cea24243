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
class Place:
    """Where one node stands in a job, and where its ranks meet the others."""

    node: int  # 0 has rank 0
    num_nodes: int
    ranks_per_node: int
    master_host: str  # of node 0, as every node can resolve it
    master_port: int
    interface: str | None = None  # for gloo; None: what the host's own name resolves to


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One process. `env` is what it gets besides the environment of its launcher."""

    rank: int
    argv: tuple[str, ...]
    env: dict[str, str]
    log_path: Path  # appended to


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Processes of one job on this machine, in rank order; `num_ranks` counts those of other machines too."""

    num_ranks: int
    ranks: tuple[RankPlan, ...]


def train_argv(python: str, config: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """The command of every rank: the same one that runs alone."""
    return (python, "-m", "pretrain.main", "pretrain", config, *overrides)


def local_plan(
    argv: Sequence[str], num_ranks: int, log_dir: Path, machine: Machine, environment: Mapping[str, str]
) -> Plan:
    """`num_ranks` processes of `argv` on this machine, which meet on 127.0.0.1."""
    place = Place(
        node=0, num_nodes=1, ranks_per_node=num_ranks, master_host="127.0.0.1", master_port=machine.master_port
    )
    return node_plan(argv, place, log_dir, machine, environment)


def node_plan(
    argv: Sequence[str], place: Place, log_dir: Path, machine: Machine, environment: Mapping[str, str]
) -> Plan:
    """One node's processes of `argv` in a job of one or more nodes.

    Variables that choose the machine's resources (OMP_NUM_THREADS, DS_ACCELERATOR, GLOO_SOCKET_IFNAME) are left alone
    where `environment` has them; those that say who a rank is always come from here.
    """
    shared = {
        "WORLD_SIZE": str(place.num_nodes * place.ranks_per_node),
        "LOCAL_WORLD_SIZE": str(place.ranks_per_node),
        "MASTER_ADDR": place.master_host,
        "MASTER_PORT": str(place.master_port),
    }
    if not environment.get("OMP_NUM_THREADS"):
        shared["OMP_NUM_THREADS"] = str(max(1, machine.num_cores // place.ranks_per_node))
    if not machine.has_gpu and not environment.get("DS_ACCELERATOR"):
        shared["DS_ACCELERATOR"] = "cpu"
    if place.interface is not None and not environment.get("GLOO_SOCKET_IFNAME"):
        shared["GLOO_SOCKET_IFNAME"] = place.interface
    first = place.node * place.ranks_per_node
    return Plan(
        num_ranks=place.num_nodes * place.ranks_per_node,
        ranks=tuple(
            RankPlan(
                rank=first + local,
                argv=tuple(argv),
                env={"RANK": str(first + local), "LOCAL_RANK": str(local), **shared},
                log_path=log_dir / f"{machine.host}-{first + local}.log",
            )
            for local in range(place.ranks_per_node)
        ),
    )


def render(plan: Plan) -> str:
    """The plan as text: a line a rank that a POSIX shell would run, for people to read and copy."""
    lines = []
    for rank in plan.ranks:
        assignments = [f"{name}={shlex.quote(value)}" for name, value in sorted(rank.env.items())]
        lines.append(" ".join([*assignments, shlex.join(rank.argv), ">>", shlex.quote(str(rank.log_path))]))
    return "\n".join(lines) + "\n"
