"""The local launcher with real processes: a stand-in program in place of the trainer, everything else as it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from data_pipeline.settings import UserError
from data_pipeline.shards import SCHEMA_VERSION
from launch.command import check_run
from launch.failures import first_failure, outcome
from launch.local import free_port, run, this_machine
from launch.plan import EXIT_RUN_AGAIN, Machine, Plan, local_plan, render, train_argv
from pretrain import signals
from pretrain.config import RunConfig

MACHINE = Machine(host="node a", num_cores=8, has_gpu=False, master_port=23456)

# Each rank notes its pid, then does what is written for it: "exit N", "sleep S", "die SIGNAL", "stop-on-signal", ...
STAND_IN = """
import os, signal, subprocess, sys, time
rank, folder = os.environ["RANK"], sys.argv[1]
deed, _, argument = sys.argv[2 + int(rank)].partition(" ")
def note(name, text):
    with open(f"{folder}/{name}", "a") as stream:
        stream.write(f"{text}\\n")
if deed == "stop-on-signal":
    def stop(number, frame):
        note(f"signals-{rank}", signal.Signals(number).name)
        if number == signal.SIGUSR1:
            sys.exit(75)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)
if deed == "worker":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    note("worker-pid", child.pid)
    sys.exit(int(argument))
note(f"pid-{rank}", os.getpid())
print(f"rank {rank} of {os.environ['WORLD_SIZE']} says hello", flush=True)
if deed == "exit":
    sys.exit(int(argument))
if deed == "fail-after":
    while not os.path.exists(f"{folder}/pid-0"):
        time.sleep(0.02)
    time.sleep(float(argument))
    print("line that explains", file=sys.stderr)
    sys.exit(3)
if deed == "die":
    os.kill(os.getpid(), getattr(signal, argument))
if deed == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(f"deaf-{rank}", "")
if deed == "fail-when-deaf":
    while not os.path.exists(f"{folder}/deaf-{argument}"):
        time.sleep(0.02)
    sys.exit(4)
time.sleep(60)
"""


def stand_in(folder: Path, *deeds: str) -> Plan:
    """A plan whose rank r does deeds[r]."""
    folder.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-c", STAND_IN, str(folder), *deeds]
    return local_plan(argv, len(deeds), folder / "logs", MACHINE, {"OMP_NUM_THREADS": "1"})


def launcher(folder: Path, *deeds: str) -> subprocess.Popen[bytes]:
    """The launcher in a process of its own, once every rank of it runs."""
    code = (
        "import sys; from pathlib import Path; from tests.test_launch_local import stand_in; "
        "from launch.local import run; sys.exit(run(stand_in(Path(sys.argv[1]), *sys.argv[2:]), grace_s=2))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), *deeds], stderr=subprocess.PIPE)
    wait_until(lambda: all((folder / f"pid-{rank}").exists() for rank in range(len(deeds))))
    return process


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def pid(folder: Path, name: str) -> int:
    """A process id that the stand-in noted."""
    return int((folder / name).read_text())


def is_running(process_id: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# The plan, as data


def test_plan_gives_each_rank_its_place() -> None:
    plan = local_plan(["prog", "a b"], 2, Path("run/logs"), MACHINE, {})
    assert [rank.env["RANK"] for rank in plan.ranks] == ["0", "1"]
    assert [rank.env["LOCAL_RANK"] for rank in plan.ranks] == ["0", "1"]
    for rank in plan.ranks:
        assert rank.argv == ("prog", "a b")
        assert rank.env["WORLD_SIZE"] == rank.env["LOCAL_WORLD_SIZE"] == "2"
        assert (rank.env["MASTER_ADDR"], rank.env["MASTER_PORT"]) == ("127.0.0.1", "23456")
        assert rank.env["OMP_NUM_THREADS"] == "4"
        assert rank.env["DS_ACCELERATOR"] == "cpu"
    assert [str(rank.log_path) for rank in plan.ranks] == ["run/logs/node a-0.log", "run/logs/node a-1.log"]


def test_plan_leaves_resources_that_are_set_alone_but_not_the_rank() -> None:
    environment = {"OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cuda", "RANK": "7", "WORLD_SIZE": "9"}
    env = local_plan(["p"], 1, Path("logs"), MACHINE, environment).ranks[0].env
    assert "OMP_NUM_THREADS" not in env
    assert "DS_ACCELERATOR" not in env
    assert (env["RANK"], env["WORLD_SIZE"]) == ("0", "1")


def test_more_ranks_than_cores_still_compute() -> None:
    assert local_plan(["p"], 16, Path("logs"), MACHINE, {}).ranks[0].env["OMP_NUM_THREADS"] == "1"


def test_a_gpu_machine_is_left_to_choose_its_accelerator() -> None:
    machine = Machine(host="h", num_cores=1, has_gpu=True, master_port=1)
    assert "DS_ACCELERATOR" not in local_plan(["p"], 1, Path("logs"), machine, {}).ranks[0].env


def test_rendered_plan_is_what_a_shell_runs(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['RANK'], sys.argv[1:])"
    argv = [sys.executable, "-c", code, "it's", "a b", "$HOME;`x`"]
    text = render(local_plan(argv, 2, tmp_path / "logs of mine", MACHINE, {}))
    (tmp_path / "logs of mine").mkdir()
    subprocess.run(["sh", "-e"], input=text.encode(), check=True)
    for rank in range(2):
        log = tmp_path / "logs of mine" / f"node a-{rank}.log"
        assert log.read_text() == f"{rank} {argv[3:]}\n"


def test_ranks_run_the_command_that_runs_alone() -> None:
    assert train_argv("py", "c.yaml", ["a=1"]) == ("py", "-m", "pretrain.main", "pretrain", "c.yaml", "a=1")


def test_launcher_and_trainer_agree_on_the_code_for_again() -> None:
    assert EXIT_RUN_AGAIN == signals.EXIT_RUN_AGAIN


# The processes


def test_all_ranks_end_well(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run(stand_in(tmp_path, "exit 0", "exit 0")) == 0
    assert capfdbinary.readouterr().out == b"rank 0 of 2 says hello\n"
    for rank in range(2):
        assert f"rank {rank} of 2 says hello" in (tmp_path / "logs" / f"node a-{rank}.log").read_text()


def test_logs_of_both_lives_are_kept(tmp_path: Path) -> None:
    run(stand_in(tmp_path, "exit 0"))
    run(stand_in(tmp_path, "exit 0"))
    lines = (tmp_path / "logs" / "node a-0.log").read_text().splitlines()
    assert [line for line in lines if not line.startswith("---")] == ["rank 0 of 1 says hello"] * 2
    assert len(lines) == 4


def test_ranks_that_ask_to_be_run_again(tmp_path: Path) -> None:
    assert run(stand_in(tmp_path, "exit 75", "exit 75")) == 75


def test_failure_wins_over_again(tmp_path: Path) -> None:
    assert run(stand_in(tmp_path, "exit 75", "exit 5")) == 5


def test_first_failure_ends_the_others_and_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(stand_in(tmp_path, "sleep", "fail-after 0.5")) == 3
    said = capfd.readouterr().err
    assert "rank 1 of 2 exited with code 3" in said
    assert "  rank 1 | line that explains" in said
    assert not is_running(pid(tmp_path, "pid-0"))


def test_rank_that_dies_of_a_signal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(stand_in(tmp_path, "die SIGKILL", "sleep")) == 128 + signal.SIGKILL
    assert "rank 0 of 2 was ended by SIGKILL" in capfd.readouterr().err


def test_rank_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    assert run(stand_in(tmp_path, "deaf", "fail-when-deaf 0"), grace_s=0.3) == 4
    assert not is_running(pid(tmp_path, "pid-0"))


def test_what_a_rank_leaves_behind_is_killed(tmp_path: Path) -> None:
    assert run(stand_in(tmp_path, "worker 0")) == 0
    wait_until(lambda: not is_running(pid(tmp_path, "worker-pid")))


def test_program_that_is_not_there(tmp_path: Path) -> None:
    plan = local_plan([str(tmp_path / "nothing")], 2, tmp_path / "logs", MACHINE, {})
    with pytest.raises(UserError, match=r"rank 0: cannot start .*nothing"):
        run(plan)


def test_signals_reach_every_rank_once(tmp_path: Path) -> None:
    process = launcher(tmp_path, "stop-on-signal", "stop-on-signal")
    for number, expected in ((signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGUSR1, 3)):
        process.send_signal(number)
        files = [tmp_path / f"signals-{rank}" for rank in range(2)]
        wait_until(lambda: all(f.exists() and len(f.read_text().splitlines()) >= expected for f in files))  # noqa: B023
    process.communicate(timeout=20)
    assert process.returncode == 75
    for rank in range(2):
        assert (tmp_path / f"signals-{rank}").read_text().split() == ["SIGINT", "SIGTERM", "SIGUSR1"]


def test_a_signal_before_anybody_listens_is_a_stop(tmp_path: Path) -> None:
    process = launcher(tmp_path, "sleep", "sleep")
    process.terminate()
    said = process.communicate(timeout=20)[1].decode()
    assert process.returncode == EXIT_RUN_AGAIN
    assert "was ended" not in said


def test_first_failure_leaves_a_record(tmp_path: Path) -> None:
    assert run(stand_in(tmp_path, "sleep", "fail-after 0.3"), tmp_path / "run") == 3
    failure = first_failure(tmp_path / "run", "local")
    assert failure is not None
    assert (failure.rank, failure.code) == (1, 3)
    assert failure.line().endswith("exited with code 3: line that explains")
    assert outcome(tmp_path / "run", "local", 75)[0] == 3  # a stop elsewhere does not hide it
    run(stand_in(tmp_path / "again", "exit 0", "exit 0"), tmp_path / "run")
    assert first_failure(tmp_path / "run", "local") is None


def test_fewer_ranks_forget_the_failures_of_more(tmp_path: Path) -> None:
    assert run(stand_in(tmp_path, "exit 0", "exit 0", "exit 3"), tmp_path / "run") == 3
    torn = tmp_path / "run" / "failures" / ".local-rank-00002.json.partial"  # its launcher was killed while it wrote
    torn.write_text("{")
    run(stand_in(tmp_path / "again", "exit 0"), tmp_path / "run")
    assert first_failure(tmp_path / "run", "local") is None
    assert not list(torn.parent.iterdir())


def test_what_both_ranks_say_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = local_plan(["sh", "-c", "sleep 0.$((RANK * 5)); echo the same mistake; exit 2"], 2, tmp_path, MACHINE, {})
    assert run(plan) == 2
    both = capfd.readouterr()
    assert (both.out + both.err).count("the same mistake") == 1


def test_out_of_memory_is_guessed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(stand_in(tmp_path, "die SIGKILL"))
    assert "lower train.chunk or data.num_workers" in capfd.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux only")
def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    process = launcher(tmp_path, "deaf", "stop-on-signal")
    ranks = [pid(tmp_path, f"pid-{rank}") for rank in range(2)]
    assert all(is_running(rank) for rank in ranks)
    process.kill()
    process.communicate(timeout=20)
    wait_until(lambda: not any(is_running(rank) for rank in ranks))


def test_launcher_of_this_process_restores_its_signal_handlers(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run(stand_in(tmp_path, "exit 0"))
    assert signal.getsignal(signal.SIGTERM) is before


# The command: mistakes before any process


def config_of(folder: Path) -> dict[str, object]:
    """A valid config whose data folder holds only a description."""
    (folder / "data").mkdir()
    description = {"schema_version": SCHEMA_VERSION, "shards": [{"split": "train", "num_samples": 8}]}
    (folder / "data" / "dataset.json").write_text(json.dumps(description))
    return {
        "run_dir": str(folder / "run"),
        "data": {"train": {"path": str(folder / "data"), "split": "train"}},
        "towers": {"text": {}, "video": {}},
        "objective": [{"name": "infonce"}],
        "schedule": {"num_steps": 1},
        "train": {"global_batch": 8},
    }


def launch_local(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`parallelotope launch local` with the config of this folder."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of(folder)))
    command = [sys.executable, "-m", "pretrain.main", "launch", "local", str(folder / "config.yaml"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "3"], "train.global_batch 8 is not divisible by 3 ranks"),
        (["--ranks", "2", "train.chunks=2"], "train.chunks: unknown key; did you mean 'chunk'?"),
        (["data.train.split=trian"], "no split 'trian'; did you mean 'train'?"),
    ],
)
def test_mistakes_are_one_line_before_any_process(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = launch_local(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_missing_data_folder_is_named(tmp_path: Path) -> None:
    config = RunConfig.model_validate(config_of(tmp_path))
    (tmp_path / "data" / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"no dataset\.json"):
        check_run(config, 2)


def test_a_dataset_without_samples_is_named(tmp_path: Path) -> None:
    config = RunConfig.model_validate(config_of(tmp_path))
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION, "shards": []}))
    with pytest.raises(UserError, match="data holds no sample: every row was rejected"):
        check_run(config, 2)


def test_dry_run_prints_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    done = launch_local(tmp_path, "--ranks", "2", "--dry-run", "seed=3")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("pretrain.main pretrain" in line and "seed=3" in line for line in lines)
    assert not (tmp_path / "run").exists()


def test_facts_of_this_machine() -> None:
    machine = this_machine()
    assert machine.num_cores >= 1
    assert 20_000 <= machine.master_port < 32_768
    assert free_port() != 0
