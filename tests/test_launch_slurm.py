"""The batch script as text, places and meeting points of nodes, and mistakes before anything is queued."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.settings import UserError
from launch.failures import Failure, first_failure, outcome, record_failure
from launch.plan import Machine, Place, node_plan
from launch.rendezvous import check_meeting_point, leading_interface, own_name_is_loopback, place_of_this_node
from launch.slurm import SlurmJob, clean_environment, parse_option, render_script
from tests.test_resume import write_config

AWKWARD = """it's "100%" of $HOME; `x` \\ done"""
JOB = SlurmJob(
    name="run", command=("python", "-m", "pretrain.main", "launch", "node", "c.yaml"), python="python",
    run_dir=Path("/runs/run"), work_dir=Path("/home/me"), num_nodes=2, cpus_per_node=8, gpus_per_node=None, memory=None,
    time_limit="01:00:00", signal_s=90, max_requeues=3, requeue=True,
)  # fmt: skip


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_script_asks_for_what_the_job_says() -> None:
    found = directives(render_script(JOB))
    for expected in (
        "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=8", "--time=01:00:00", "--signal=USR1@90", "--requeue",
        "--open-mode=append", "--output=/runs/run/logs/slurm-%j.log",
    ):  # fmt: skip
        assert expected in found
    assert not any("gpus" in option or "mem" in option for option in found)
    own = directives(render_script(replace(JOB, gpus_per_node=4, requeue=False, options=(("constraint", "a b"),))))
    assert {"--gpus-per-node=4", "--no-requeue", '--constraint="a b"'} <= set(own)


def test_script_is_bash() -> None:
    for job in (
        JOB,
        replace(JOB, requeue=False),
        replace(JOB, setup=("module load cuda",), work_dir=Path(f"/{AWKWARD}")),
    ):
        done = subprocess.run(["bash", "-n"], input=render_script(job), text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


def run_script(job: SlurmJob, folder: Path, srun: str, restarts: int, state: str = "RUNNING") -> tuple[int, list[str]]:
    """Run a rendered script with programs in place of srun and scontrol; returns its code and what they were called."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name, does in {"srun": srun, "scontrol": f"echo JobState={state}", "sleep": ""}.items():
        path = programs / name
        path.write_text(
            f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >> "{folder}/calls"; echo >> "{folder}/calls"\n{does}\n'
        )
        path.chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_RESTART_COUNT": str(restarts), "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(["bash", "-c", render_script(job)], env=environment, capture_output=True, text=True)
    return done.returncode, (folder / "calls").read_text().splitlines()


def own_job(folder: Path) -> SlurmJob:
    """A job in a folder with an awkward name."""
    awkward = folder / AWKWARD
    awkward.mkdir()
    return replace(JOB, run_dir=awkward / "run", work_dir=awkward, python=sys.executable, command=("node", AWKWARD))


@pytest.mark.parametrize(
    ("srun_code", "restarts", "code", "requeued"),
    [(0, 0, 0, False), (75, 0, 75, True), (75, 2, 75, True), (75, 3, 75, False), (1, 0, 1, False)],
)
def test_script_requeues_what_stopped_and_nothing_else(
    tmp_path: Path, srun_code: int, restarts: int, code: int, requeued: bool
) -> None:
    found, calls = run_script(own_job(tmp_path), tmp_path / "t", f"exit {srun_code}", restarts)
    assert found == code
    assert calls[0].split("\0")[:-1][-2:] == ["node", AWKWARD]
    assert any(call.startswith("scontrol\0requeue\0" + "7") for call in calls) == requeued


def test_a_cancelled_job_is_not_requeued(tmp_path: Path) -> None:
    found, calls = run_script(own_job(tmp_path), tmp_path / "t", "exit 75", 0, state="COMPLETING")
    assert found == 75
    assert not any(call.startswith("scontrol\0requeue") for call in calls)


def test_a_failure_on_one_node_is_not_hidden_by_a_stop_on_another(tmp_path: Path) -> None:
    job = own_job(tmp_path)
    record_failure(job.run_dir, failure(rank=1, code=-9, life="7.0"))
    found, calls = run_script(job, tmp_path / "t", "exit 75", 0)
    assert found == 128 + 9
    assert not any(call.startswith("scontrol") for call in calls)


def failure(**changes: object) -> Failure:
    values = {"life": "7.0", "rank": 0, "host": "n1", "code": 1, "how": "exited with code 1", "time_s": 10.0}
    return Failure(**{**values, "last_lines": ("Traceback", "ValueError: no", ""), **changes})  # type: ignore[arg-type]


def test_the_first_failure_is_the_cause_not_what_followed(tmp_path: Path) -> None:
    record_failure(tmp_path, failure(rank=0, time_s=9.5, last_lines=("RuntimeError: Connection closed by peer",)))
    record_failure(tmp_path, failure(rank=3, host="n2", time_s=10.0))
    record_failure(tmp_path, failure(rank=2, life="7.1", time_s=1.0))
    found = first_failure(tmp_path, "7.0")
    assert found is not None
    assert found.line() == "rank 3 on n2 exited with code 1: ValueError: no"
    code, line = outcome(tmp_path, "7.0", 143)
    assert code == 1
    assert line.endswith(found.line())
    assert outcome(tmp_path, "7.2", 0) == (0, "finished")
    assert outcome(tmp_path, "7.2", 137)[0] == 137
    for early in (128 + signal.SIGUSR1, 128 + signal.SIGTERM):  # the signal came before the launcher listened
        assert outcome(tmp_path, "7.2", early)[0] == 75
        assert outcome(tmp_path, "7.0", early)[0] == 1


def test_options_of_a_site() -> None:
    assert parse_option("constraint=a100|h100") == ("constraint", "a100|h100")
    assert parse_option("--exclusive") == ("exclusive", None)
    for wrong in ("=x", "two words", "a=b\n#SBATCH --x", ""):
        with pytest.raises(UserError, match="--sbatch"):
            parse_option(wrong)


def test_an_outer_job_does_not_shape_the_new_one() -> None:
    outer = {"SLURM_NTASKS": "8", "SBATCH_PARTITION": "debug", "SLURM_CONF": "/etc/x", "PATH": "/bin"}
    assert clean_environment(outer) == {"SLURM_CONF": "/etc/x", "PATH": "/bin"}


# Nodes and where they meet


def test_ranks_of_the_second_node(tmp_path: Path) -> None:
    place = Place(node=1, num_nodes=2, ranks_per_node=4, master_host="n1", master_port=23000, interface="ib0")
    machine = Machine(host="n2", num_cores=8, has_gpu=False, master_port=1)
    plan = node_plan(["p"], place, tmp_path, machine, {})
    assert plan.num_ranks == 8
    assert [rank.env["RANK"] for rank in plan.ranks] == ["4", "5", "6", "7"]
    assert [rank.env["LOCAL_RANK"] for rank in plan.ranks] == ["0", "1", "2", "3"]
    assert {rank.env["WORLD_SIZE"] for rank in plan.ranks} == {"8"}
    assert (
        plan.ranks[0].env | {"MASTER_ADDR": "n1", "MASTER_PORT": "23000", "GLOO_SOCKET_IFNAME": "ib0"}
        == plan.ranks[0].env
    )
    assert [rank.log_path.name for rank in plan.ranks] == ["n2-4.log", "n2-5.log", "n2-6.log", "n2-7.log"]


def test_place_from_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_NODEID": "2", "SLURM_JOB_ID": "12005"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    place = place_of_this_node(3, 1, None, None, None, "eth7", os.environ)
    assert (place.node, place.master_host, place.master_port, place.interface) == (2, "gpu07", 20005, "eth7")


def test_place_of_a_pod() -> None:
    place = place_of_this_node(2, 1, None, "job-0-0.job", 23456, "eth0", {"JOB_COMPLETION_INDEX": "1"})
    assert (place.node, place.master_host, place.master_port) == (1, "job-0-0.job", 23456)


@pytest.mark.parametrize(
    ("node", "host", "message"),
    [(None, "h", "which node is this"), (0, None, "which node has rank 0"), (2, "h", "expected 0 to 1 of 2 nodes")],
)
def test_nobody_knows_the_place(node: int | None, host: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        place_of_this_node(2, 1, node, host, 1, None, {})


def test_an_unknown_first_host_is_a_line() -> None:
    place = Place(node=1, num_nodes=2, ranks_per_node=1, master_host="no-such-host.invalid", master_port=23000)
    with pytest.raises(UserError, match=r"master host 'no-such-host\.invalid': cannot be resolved"):
        check_meeting_point(place, timeout_s=0)


def test_a_taken_port_is_a_line() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        place = Place(node=0, num_nodes=2, ranks_per_node=1, master_host="localhost", master_port=port)
        with pytest.raises(UserError, match=rf"port {port} of .* is taken"):
            check_meeting_point(place)
    check_meeting_point(place)


def test_interface_that_leads_out_is_one_of_this_machine() -> None:
    assert leading_interface() in {None, *(name for _, name in socket.if_nameindex())}
    assert own_name_is_loopback() in (True, False)


# The command


def launch_slurm(
    folder: Path, config: Path, *options: str, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain.main", "launch", "slurm", str(config), *options]
    environment = os.environ | ({"PATH": path} if path is not None else {})
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=60)


def test_a_node_that_cannot_start_leaves_a_record(small_dataset: Path, tmp_path: Path) -> None:
    """On this node the data is not there; the launchers of other nodes know nothing of it."""
    run = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", small_dataset, run, train={"global_batch": 8})
    command = [sys.executable, "-m", "pretrain.main", "launch", "node", str(config), "data.train.path=/not/mounted"]
    command += ["--nodes", "2", "--ranks-per-node", "4", "--node-rank", "1", "--master-host", "localhost"]
    for life in ({}, {"PARALLELOTOPE_LIFE": "7.0"}):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | life, timeout=60)
        assert done.returncode == 2
        assert (run / "failures").exists() == bool(life)
    code, line = outcome(run, "7.0", 137)
    assert code == 2
    assert f"rank 4 on {socket.gethostname()} could not be started: " in line
    assert "/not/mounted" in line


def test_dry_run_prints_the_script_and_leaves_nothing(small_dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "my config.yaml", small_dataset, tmp_path / "run")
    done = launch_slurm(
        tmp_path, config, "--nodes", "2", "--dry-run", "--partition", "gpu", "--sbatch", "exclusive", "seed=7", path=""
    )
    assert done.returncode == 0, done.stderr
    assert {"--partition=gpu", "--exclusive", "--nodes=2"} <= set(directives(done.stdout))
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("srun ")]
    words = shlex.split(line)
    assert words[words.index("node") + 1] == str(tmp_path / "run" / "job.yaml")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "4"], "train.global_batch 6 is not divisible by 4 ranks"),
        (["train.chunks=2"], "train.chunks: unknown key; did you mean 'chunk'?"),
        (["--sbatch", "?"], "--sbatch '?': expected NAME=VALUE"),
        ([], "no sbatch on PATH; expected a login node of a Slurm cluster, or --dry-run"),
    ],
)
def test_mistakes_are_a_line(small_dataset: Path, tmp_path: Path, options: list[str], message: str) -> None:
    config = write_config(tmp_path / "config.yaml", small_dataset, tmp_path / "run")
    done = launch_slurm(tmp_path, config, *options, path="")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_refused_job_leaves_the_folder_as_it_was(small_dataset: Path, tmp_path: Path) -> None:
    programs, run = tmp_path / "bin", tmp_path / "runs" / "new" / "run"
    programs.mkdir()
    (programs / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    (programs / "sbatch").chmod(0o755)
    config = write_config(tmp_path / "config.yaml", small_dataset, run)
    path = f"{programs}:{os.environ['PATH']}"
    done = launch_slurm(tmp_path, config, path=path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "sbatch refuses the job: sbatch: error: invalid partition" in done.stderr
    assert not (tmp_path / "runs").exists()
    run.mkdir(parents=True)
    (run / "job.yaml").write_text("of the job that runs")
    assert launch_slurm(tmp_path, config, path=path).returncode == 2
    assert [(path.name, path.read_text()) for path in run.iterdir()] == [("job.yaml", "of the job that runs")]


def test_no_value_of_the_environment_is_written_down(small_dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", small_dataset, tmp_path / "run")
    command = [sys.executable, "-m", "pretrain.main", "launch", "slurm", str(config), "--dry-run"]
    secret = "hunter2hunter2"
    environment = os.environ | {"HF_TOKEN": secret, "WANDB_API_KEY": secret}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    assert not re.search(secret, done.stdout + done.stderr)
