"""Training on a real Slurm cluster of two nodes: to the end, over a time limit, and with a rank that fails."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from data_pipeline.settings import load_settings
from pretrain.checkpoint import finished_checkpoints
from pretrain.config import RunConfig
from pretrain.stored_tensors import StoredTensors
from tests.slurm_cluster import SlurmCluster, read_steps, wait_until, why_not_here
from tests.test_resume import finish, write_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not_here() is not None, reason=str(why_not_here())),
]
LONG = 60  # steps


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(num_nodes=2)
    yield cluster
    cluster.close()


def submit(cluster: SlurmCluster, folder: Path, config: Path, *options: str) -> str:
    """The job id that `parallelotope launch slurm` prints."""
    command = [sys.executable, "-m", "pretrain.main", "launch", "slurm", str(config), "--nodes", "2", *options]
    done = cluster.run([*command, "--cpus-per-node", "2"], cwd=str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def ranks_on(cluster: SlurmCluster, node: str) -> list[int]:
    """Processes that train, without those that decode for them."""
    found = cluster.pids_on(node, "pretrain.main pretrain")
    return [pid for pid in found if parent_of(pid) not in found]


def is_held(pid: int) -> bool:
    """Whether a process is stopped, with no SIGUSR1 waiting for it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    (mask,) = re.findall(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)
    return re.search(r"^State:\s*T", status, re.MULTILINE) is not None and not int(mask, 16) >> signal.SIGUSR1 - 1 & 1


def hold_until_signalled(ranks: list[int]) -> None:
    """Make time stand still for ranks until Slurm's signal, so that any machine is slow enough for it."""
    assert len(ranks) == 2
    try:
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: all(is_held(pid) for pid in ranks), 10, lambda: "all threads to stand still")
        wait_until(lambda: not any(is_held(pid) for pid in ranks), 90, lambda: "Slurm's signal")
    finally:
        for pid in ranks:
            with suppress(ProcessLookupError):  # Slurm may let them go on by itself
                os.kill(pid, signal.SIGCONT)


def until_ended(cluster: SlurmCluster, job: str, run: Path) -> None:
    """Wait until a job that requeues itself is over."""

    def ended() -> bool:
        if cluster.state(job) == "PENDING":
            cluster.hurry(job)
        return cluster.state(job) in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")

    wait_until(ended, 480, lambda: f"job {job}, {cluster.state(job)}\n{log_of(run, job).read_text()}")


def log_of(run: Path, job: str) -> Path:
    return run / "logs" / f"slurm-{job}.log"


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def same_state(run: Path, other: Path) -> None:
    """The last checkpoints of two runs are bitwise equal: weights and moments."""
    ours, theirs = (StoredTensors(finished_checkpoints(folder)[-1]) for folder in (run, other))
    assert finished_checkpoints(run)[-1].name == finished_checkpoints(other)[-1].name
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_nodes_train_what_two_local_ranks_train(cluster: SlurmCluster, small_dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    run, local = folder / "run 100%", folder / "local"
    job = submit(cluster, folder, write_config(folder / "a config.yaml", small_dataset, run))
    cluster.wait_for(job, ["COMPLETED", "FAILED"], 300, log_of(run, job))
    said = log_of(run, job).read_text()
    assert cluster.state(job) == "COMPLETED", said
    assert load_settings(RunConfig, run / "job.yaml") == load_settings(RunConfig, folder / "a config.yaml")
    assert "node 0 of 2 (node1): ranks 0 to 0, meeting at node1:" in said
    assert said.splitlines()[-1] == "parallelotope: finished"
    assert {path.name for path in (run / "logs" / f"{job}.0").iterdir()} == {"node1-0.log", "node2-1.log"}
    finish(write_config(tmp_path / "local.yaml", small_dataset, local), 2)
    same_state(run, local)


def test_a_time_limit_is_a_requeue_and_changes_nothing(
    cluster: SlurmCluster, small_dataset: Path, tmp_path: Path
) -> None:
    changes = {"schedule": {"num_steps": LONG}, "checkpoint": {"every_steps": 500}, "validation": {"every_steps": 500}}
    run, local = tmp_path / "run", tmp_path / "local"
    config = write_config(tmp_path / "config.yaml", small_dataset, run, **changes)
    # Slurm looks every 30 s for jobs to signal and rather signals early: here 20 to 50 s after the start.
    job = submit(cluster, tmp_path, config, "--time", "00:01:00", "--signal-s", "10")
    stop = "parallelotope: stopped; the same command continues the run"
    begun = lambda: len(read_steps(run)) > 5 or stop in read(log_of(run, job))  # noqa: E731
    wait_until(begun, 60, lambda: f"step 5\n{read(log_of(run, job))}")
    if stop not in read(log_of(run, job)):
        hold_until_signalled([pid for node in cluster.nodes for pid in ranks_on(cluster, node)])
    wait_until(lambda: stop in read(log_of(run, job)), 90, lambda: read(log_of(run, job)))
    steps = re.findall(r"stopped after step (\d+) by SIGUSR1", log_of(run, job).read_text())
    assert steps, log_of(run, job).read_text()
    stopped_at = int(steps[0])
    assert 0 < stopped_at < LONG
    until_ended(cluster, job, run)
    said = log_of(run, job).read_text()
    assert cluster.state(job) == "COMPLETED", said
    assert f"resumed from {run}/checkpoints/step-{stopped_at:08d}" in said
    assert read_steps(run) == list(range(1, LONG + 1))
    finish(write_config(tmp_path / "local.yaml", small_dataset, local, **changes), 2)
    same_state(run, local)


def test_a_rank_that_raises_is_named(cluster: SlurmCluster, small_dataset: Path, tmp_path: Path) -> None:
    """Where rank 1 writes the keys of its samples there is a folder: it alone cannot."""
    run = tmp_path / "run"
    (run / "samples" / "rank-00001.jsonl").mkdir(parents=True)
    (run / "logs").mkdir()  # a run's folder
    job = submit(cluster, tmp_path, write_config(tmp_path / "config.yaml", small_dataset, run))
    assert cluster.wait_for(job, ["COMPLETED", "FAILED"], 240, log_of(run, job)) == "FAILED"
    last = log_of(run, job).read_text().splitlines()[-1]
    assert "failed: at" in last
    assert "rank 1 on node2 exited with code 2: error: " in last
    assert "rank-00001.jsonl: cannot be written: Is a directory" in last
    assert cluster.exit_code(job) == 2


def test_a_killed_rank_is_named_and_the_job_resumes(cluster: SlurmCluster, small_dataset: Path, tmp_path: Path) -> None:
    changes = {"schedule": {"num_steps": 120}, "checkpoint": {"every_steps": 20, "keep_last": 2}}
    changes |= {"validation": {"every_steps": 100}}
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, write_config(tmp_path / "config.yaml", small_dataset, run, **changes))
    wait_until(lambda: len(read_steps(run)) > 30, 240, lambda: f"step 30\n{cluster.logs()}")
    (rank,) = ranks_on(cluster, "node2")
    os.kill(rank, signal.SIGKILL)
    assert cluster.wait_for(job, ["COMPLETED", "FAILED"], 180, log_of(run, job)) == "FAILED"
    assert "rank 1 on node2 was ended by SIGKILL" in log_of(run, job).read_text().splitlines()[-1]
    assert cluster.exit_code(job) == 128 + signal.SIGKILL
    script = run / "job.sbatch"
    again = cluster.call("sbatch", "--parsable", str(script), cwd=str(tmp_path))
    assert cluster.wait_for(again, ["COMPLETED", "FAILED"], 300, log_of(run, again)) == "COMPLETED"
    assert "resumed from" in log_of(run, again).read_text()
    assert read_steps(run) == list(range(1, 121))


def test_cancelled_is_cancelled(cluster: SlurmCluster, small_dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = {"schedule": {"num_steps": 5000}, "checkpoint": {"every_steps": 1000}}
    job = submit(cluster, tmp_path, write_config(tmp_path / "config.yaml", small_dataset, run, **changes))
    wait_until(lambda: len(read_steps(run)) > 5, 240, lambda: f"step 5\n{cluster.logs()}")
    cluster.call("scancel", job)
    assert cluster.wait_for(job, ["CANCELLED", "PENDING", "COMPLETED", "FAILED"], 90) == "CANCELLED"
    wait_until(lambda: not subprocess.run(["pgrep", "-f", str(run)], capture_output=True).stdout, 90, lambda: "the end")
    assert cluster.state(job) == "CANCELLED"
