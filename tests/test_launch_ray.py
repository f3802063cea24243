"""A real Ray head with token authentication: sharding as a job and from outside writes the bytes of a local run."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from data_pipeline.config import ShardConfig
from launch.delivery import SCRIPT, VARIABLE
from launch.ray import job_request
from tests.media import write_clip

NUM_ROWS = 12
RAY_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
BIN = Path(sys.prefix) / "bin"
HEAD_TIMEOUT_S = 90.0


@dataclass(frozen=True, kw_only=True)
class Head:
    """A running head: where it listens, and files with its token and with another one."""

    jobs: str  # http://HOST:PORT
    gcs: str  # HOST:PORT
    client: str  # ray://HOST:PORT
    token: Path
    wrong_token: Path


def plain_environment(**more: str) -> dict[str, str]:
    """The environment without what would lead to a cluster or a token."""
    kept = {name: value for name, value in os.environ.items() if name not in RAY_VARIABLES}
    return kept | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "HOME": tempfile.gettempdir()} | more


def free_ports(number: int) -> list[int]:
    """Ports below the ephemeral ones, on which nobody listens now."""
    found: list[int] = []
    for port in range(20_000 + os.getpid() % 5_000, 32_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
        if len(found) == number:
            return found
    raise AssertionError("no free ports")


def parallelotope(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "parallelotope"), *arguments],
        capture_output=True, text=True, timeout=360, env=plain_environment(**environment),
    )  # fmt: skip


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` in a session of its own, which is ended by process id: `ray stop` would end every Ray here."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray puts sockets into it
    for name in ("token", "wrong"):
        (folder / name).touch(mode=0o600)
        (folder / name).write_text(secrets.token_hex(32))
    gcs, dashboard, client, agent, agent_grpc, metrics = free_ports(6)
    options = {
        "port": gcs, "dashboard-port": dashboard, "ray-client-server-port": client, "temp-dir": folder, "num-cpus": 2,
        "dashboard-agent-listen-port": agent, "dashboard-agent-grpc-port": agent_grpc, "metrics-export-port": metrics,
        "min-worker-port": 0, "max-worker-port": 0, "object-store-memory": 100 << 20, "dashboard-host": "127.0.0.1",
    }  # fmt: skip
    command = [str(BIN / "ray"), "start", "--head", "--block", *(f"--{k}={v}" for k, v in options.items())]
    environment = plain_environment(
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(folder / "token"), PATH=f"{BIN}:{os.environ['PATH']}"
    )
    with open(folder / "head.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline_s = time.monotonic() + HEAD_TIMEOUT_S
        while b"Ray runtime started" not in (folder / "head.log").read_bytes():
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline_s, (folder / "head.log").read_text()
            time.sleep(0.1)
        yield Head(
            jobs=f"http://127.0.0.1:{dashboard}", gcs=f"127.0.0.1:{gcs}", client=f"ray://127.0.0.1:{client}",
            token=folder / "token", wrong_token=folder / "wrong",
        )  # fmt: skip
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        for pid in session_of(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def session_of(leader: int) -> list[int]:
    """Processes of the session that `leader` began."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            found += [int(entry.name)] if os.getsid(int(entry.name)) == leader else []
        except ProcessLookupError:
            continue
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of small clips, one of them gone, and `shard.yaml`."""
    corpus = tmp_path_factory.mktemp("corpus $HOME 'odd'")
    write_clip(corpus / "v.mp4", duration_s=1.0, width=64, height=48)
    write_clip(corpus / "silent.mp4", duration_s=1.0, width=64, height=48, sound=False)
    rows = [
        {
            "id": f"r{n}",
            "video": "gone.mp4" if n == 5 else "silent.mp4" if n % 4 == 0 else "v.mp4",
            "captions": f"c {n}",
        }
        for n in range(NUM_ROWS)
    ]
    (corpus / "manifest.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings = {"manifest": str(corpus / "manifest.jsonl"), "out_dir": "unset", "rows_per_task": 4}
    settings |= {"video": {"preset": "ultrafast"}, "ray": {"num_cpus": 1}}
    (corpus / "shard.yaml").write_text(yaml.safe_dump(settings))
    return corpus


@pytest.fixture(scope="module")
def local(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset as a Ray of our own writes it."""
    out = tmp_path_factory.mktemp("local") / "out"
    done = parallelotope("shard", str(corpus / "shard.yaml"), f'out_dir="{out}"')
    assert done.returncode == 0, done.stderr
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_for(path: Path) -> None:
    deadline_s = time.monotonic() + 240
    while not path.exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_a_job_brings_its_config_and_nothing_is_expanded() -> None:
    config = ShardConfig(manifest="/a b/$HOME/it's `x` ${y}.jsonl", out_dir="relative")
    request = job_request(config)
    words = shlex.split(request["entrypoint"])
    assert words == ["/bin/sh", "-c", SCRIPT, "sh", "parallelotope", "shard"]
    text = request["runtime_env"]["env_vars"][VARIABLE]
    assert "$" not in text  # what Ray would expand
    values = yaml.safe_load(text)
    assert values["manifest"] == config.manifest
    assert values["out_dir"] == os.path.abspath("relative")
    assert values["ray"]["address"] == "auto"
    assert ShardConfig.model_validate(values).bytes_config() == config.bytes_config()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:8265", "--address 127.0.0.1:8265: expected the address of a Ray dashboard, as http://HOST:8265"),
        ("http://127.0.0.1:9", "--address http://127.0.0.1:9: nobody answers there"),
    ],
)
def test_an_address_that_is_none(tmp_path: Path, address: str, said: str) -> None:
    (tmp_path / "shard.yaml").write_text("{manifest: m.csv, out_dir: out}")
    done = parallelotope("launch", "ray", str(tmp_path / "shard.yaml"), "--address", address)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_job_writes_the_bytes_of_a_local_run(head: Head, corpus: Path, local: Path, tmp_path: Path) -> None:
    out = tmp_path / "out of a job"
    command = ["launch", "ray", str(corpus / "shard.yaml"), f'out_dir="{out}"', "--address", head.jobs]
    done = parallelotope(*command, RAY_AUTH_TOKEN_PATH=str(head.token))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "shard: done: 11 clips" in done.stdout
    assert done.stderr.splitlines()[-1].endswith(" finished")
    assert contents(out) == contents(local)
    assert head.token.read_text() not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_job_that_fails_gives_its_code_and_its_words(head: Head, corpus: Path, tmp_path: Path) -> None:
    command = ["launch", "ray", str(corpus / "shard.yaml"), "--address", head.jobs]
    done = parallelotope(*command, f'manifest="{tmp_path}/gone.csv"', RAY_AUTH_TOKEN_PATH=str(head.token))
    assert done.returncode == 2
    assert f"error: manifest {tmp_path}/gone.csv: no such file" in done.stdout
    assert done.stderr.splitlines()[-1].endswith("failed with code 2; see above")

    out = tmp_path / "out"
    (out / "plan").mkdir(parents=True)
    (out / "shard-000001.tar").mkdir()  # where a task wants to write
    done = parallelotope(
        *command, f'out_dir="{out}"', "ray.max_attempts=1", RAY_AUTH_TOKEN_PATH=str(head.token)
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "task-000001 failed: IsADirectoryError" in done.stdout
    assert done.stderr.splitlines()[-1].endswith("failed with code 1; see above")


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_alone(head: Head, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [str(BIN / "parallelotope"), "launch", "ray", str(corpus / "shard.yaml"), "--address", head.jobs]
    follower = subprocess.Popen(
        [*command, f'out_dir="{out}"'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=plain_environment(RAY_AUTH_TOKEN_PATH=str(head.token)),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert follower.stderr is not None
    assert "submitted to" in follower.stderr.readline()  # a job takes seconds to start, and this one to shard
    follower.send_signal(signal.SIGINT)
    _, said = follower.communicate(timeout=60)
    assert follower.returncode == 130
    assert "goes on without us; follow it: ray job logs --follow" in said.splitlines()[-1]
    wait_for(out / "dataset.json")


@pytest.mark.slow
def test_from_outside_the_bytes_are_the_same(head: Head, corpus: Path, local: Path, tmp_path: Path) -> None:
    for number, (address, environment) in enumerate(
        ((head.gcs, {}), ("auto", {"RAY_ADDRESS": head.gcs}), (head.client, {}))
    ):
        out = tmp_path / str(number)
        done = parallelotope(
            "shard", str(corpus / "shard.yaml"), f'out_dir="{out}"', f"ray.address='{address}'",
            RAY_AUTH_TOKEN_PATH=str(head.token), **environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert contents(out) == contents(local), address


@pytest.mark.slow
def test_a_token_that_is_missing_or_wrong_is_one_line(head: Head, corpus: Path, tmp_path: Path) -> None:
    environments = (
        ({}, "wants a token"),
        ({"RAY_AUTH_TOKEN_PATH": str(head.wrong_token)}, "refuses the token"),
        ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "gone")}, "No such file"),
    )
    shard = ["shard", str(corpus / "shard.yaml"), f'out_dir="{tmp_path / "out"}"']
    commands = [[*shard, f"ray.address='{address}'"] for address in (head.gcs, head.client)]
    commands += [["launch", "ray", str(corpus / "shard.yaml"), "--address", head.jobs]]
    for environment, said in environments:
        for command in commands:
            done = parallelotope(*command, **environment)
            assert done.returncode == 2
            assert said in done.stderr
            assert "RAY_AUTH_TOKEN_PATH" in done.stderr or str(head.wrong_token) in done.stderr
            assert len(done.stderr.splitlines()) == 1, done.stderr
            assert head.wrong_token.read_text() not in done.stderr
