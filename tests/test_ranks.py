"""A process finds its place among the ranks from what its starter left in the environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pretrain.preflight import first_host

STARTERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PROGRAM = """
import os, sys
from pretrain.preflight import num_ranks
from pretrain.ranks import join_ranks, leave_ranks
before = num_ranks()
world = join_ranks(1, 60.0)
print(before, world.rank, world.size, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
leave_ranks(world, 0)
"""


def join(**environment: str) -> subprocess.CompletedProcess[str]:
    """Join the ranks in a new process that has nothing of a starter but this environment."""
    clean = {k: v for k, v in os.environ.items() if k not in STARTERS and not k.startswith("SLURM_")}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, capture_output=True, text=True, env=clean | environment, timeout=60)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("gpu[07-09,12],login1", "gpu07"), ("node1", "node1"), ("a,b", "a"), ("c[3]", "c3"), ("x[1,5]-ib", "x1")],
)
def test_first_host_of_a_slurm_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_alone() -> None:
    done = join()
    assert done.stdout.split()[:4] == ["1", "0", "1", "127.0.0.1"], done.stderr


def test_a_step_of_slurm() -> None:
    slurm = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "12345", "SLURM_NTASKS": "1"}
    done = join(**slurm, SLURM_PROCID="0", SLURM_LOCALID="0")
    assert done.stdout.split() == ["1", "0", "1", "localhost", str(20000 + 345)], done.stderr


def test_a_batch_script_of_slurm_is_no_rank() -> None:
    done = join(SLURM_JOB_ID="12345", SLURM_NTASKS="8", SLURM_PROCID="0")
    assert done.stdout.split()[:3] == ["1", "0", "1"], done.stderr


def test_half_an_environment_is_one_line() -> None:
    done = join(RANK="0")
    assert done.returncode == 1
    assert "RANK is set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT not" in done.stderr.splitlines()[-1]
