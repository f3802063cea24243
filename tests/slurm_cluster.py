"""A real Slurm cluster for tests: one controller and N nodes, each in network, name, mount and process namespaces.

Needs Linux, root, and Debian's packages slurm-wlm, munge and iproute2. Nothing outside the state folder is changed; the
kernel takes every process of a host down with the first one of its process namespace.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "ip", "unshare", "nsenter", "mount")
SBIN = "/usr/sbin:/sbin:/usr/local/sbin"
NETWORK = "10.213.77"  # seen inside the namespaces only
CPUS, MEMORY_MB = 8, 4000  # what a node claims to have
# One host: a name, its own /etc/hosts, then its daemons once the network is plugged in.
HOST = """
set -e
hostname "$1"; ip link set lo up; mount --bind "$2/hosts" /etc/hosts
touch "$2/$1.ready"; while [ ! -e "$2/$1.go" ]; do sleep 0.05; done
if [ "$1" = ctl ]; then
    munged --foreground --force --socket="$2/munge.socket" --key-file="$2/munge.key" --log-file="$2/munged.log" \\
        --pid-file="$2/munged.pid" --seed-file="$2/munged.seed" &
    while [ ! -e "$2/munge.socket" ]; do sleep 0.05; done
    slurmctld -D -f "$2/slurm.conf" &
else
    slurmd -D -N "$1" -f "$2/slurm.conf" &
fi
wait
"""


def why_not_here() -> str | None:
    """Why no cluster can be started on this machine; None: it can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "a Slurm cluster in namespaces needs Linux and root"
    path = f"{os.environ['PATH']}:{SBIN}"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    return f"not installed: {', '.join(missing)} (Debian: slurm-wlm munge iproute2)" if missing else None


class SlurmCluster:
    """Started when made; `close` ends everything it started."""

    def __init__(self, num_nodes: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 bytes
        self.folder.chmod(0o755)
        self.nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._write_files()
            for name in ["ctl", *self.nodes]:
                self._start(name)
            wait_until(self._all_idle, 60, lambda: f"idle nodes\n{self.logs()}")
        except BaseException:
            self.close()
            raise

    def call(self, *argv: str, **options: str) -> str:
        """Run a command on the controller's host in `cwd`; returns what it prints."""
        done = self.run(argv, **options)
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def run(self, argv: Sequence[str], cwd: str = "/") -> subprocess.CompletedProcess[str]:
        """Run a command on the controller's host, whatever its exit code."""
        enter = ["nsenter", f"--target={self._inner('ctl')}", "--net", "--uts", "--mount", f"--wdns={cwd}", "--"]
        return subprocess.run([*enter, *argv], capture_output=True, text=True, timeout=120, env=self._environment())

    def state(self, job: str) -> str:
        """A job's state, as COMPLETED."""
        return self._job(job, "JobState")

    def exit_code(self, job: str) -> int:
        """A finished job's exit code."""
        return int(self._job(job, "ExitCode").split(":")[0])

    def wait_for(self, job: str, states: Sequence[str], timeout_s: float, log: Path | None = None) -> str:
        """Wait until a job is in one of `states`; returns which."""

        def said() -> str:
            text = log.read_text() if log is not None and log.exists() else ""
            return f"job {job} in {states}, is {self.state(job)}\n{text}\n{self.logs()}"

        wait_until(lambda: self.state(job) in states, timeout_s, said)
        return self.state(job)

    def hurry(self, job: str) -> None:
        """Start a requeued job now: Slurm may hold it for two minutes."""
        clear = lambda: self._all_idle() or self.state(job) != "PENDING"  # noqa: E731
        wait_until(clear, 60, lambda: f"nodes clear of job {job}'s former life")
        time.sleep(1.5)
        self.run(["scontrol", "update", f"JobId={job}", "StartTime=now"])  # refused where it has started by itself

    def pids_on(self, node: str, words: str) -> list[int]:
        """Processes of a node, by this machine's numbers, whose command line holds `words`."""
        space = os.readlink(f"/proc/{self._inner(node)}/ns/pid")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if words in command and os.readlink(entry / "ns/pid") == space:
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def logs(self) -> str:
        """The ends of what the daemons say."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        """End every host."""
        for process in self._hosts.values():
            process.kill()  # unshare takes the namespace's first process with it, the kernel the rest
            process.wait()
        self._hosts.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _job(self, job: str, field: str) -> str:
        found = re.search(rf"\b{field}=(\S+)", self.call("scontrol", "show", "job", job))
        assert found, field
        return found.group(1)

    def _all_idle(self) -> bool:
        done = self.run(["sinfo", "--noheader", "--Node", "--format=%T"])
        return done.stdout.split() == ["idle"] * len(self.nodes)

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return kept | {"PATH": f"{kept['PATH']}:{SBIN}", "SLURM_CONF": str(self.folder / "slurm.conf")}

    def _inner(self, name: str) -> int:
        """The first process inside a host's namespaces: the child of unshare."""
        process = self._hosts[name].pid
        return int(Path(f"/proc/{process}/task/{process}/children").read_text().split()[0])

    def _start(self, name: str) -> None:
        namespaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with open(self.folder / f"{name}.log", "ab") as log:
            self._hosts[name] = subprocess.Popen(
                ["unshare", *namespaces, "bash", "-c", HOST, "host", name, str(self.folder)],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._environment(), cwd="/",
            )  # fmt: skip
        wait_until((self.folder / f"{name}.ready").exists, 20, lambda: f"host {name}\n{self.logs()}")
        self._plug(name)
        (self.folder / f"{name}.go").touch()

    def _plug(self, name: str) -> None:
        """The controller holds a bridge; a node gets one end of a cable to it."""

        def ip(host: str, *argv: str) -> None:
            enter = ["nsenter", f"--target={self._inner(host)}", "--net", "--"]
            subprocess.run([*enter, "ip", *argv], check=True, env=self._environment(), capture_output=True)

        if name == "ctl":
            ip(name, "link", "add", "bridge", "type", "bridge")
            ip(name, "addr", "add", f"{NETWORK}.1/24", "dev", "bridge")
            ip(name, "link", "set", "bridge", "up")
            return
        number = self.nodes.index(name) + 1
        peer = str(self._inner(name))
        ip("ctl", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", peer)
        ip("ctl", "link", "set", f"to-{name}", "master", "bridge", "up")
        ip(name, "addr", "add", f"{NETWORK}.{10 + number}/24", "dev", "eth0")
        ip(name, "link", "set", "eth0", "up")

    def _write_files(self) -> None:
        addresses = {"ctl": f"{NETWORK}.1"}
        addresses |= {name: f"{NETWORK}.{10 + number}" for number, name in enumerate(self.nodes, 1)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        key = os.open(self.folder / "munge.key", os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(key, secrets.token_bytes(128))
        os.close(key)
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(self._slurm_conf())

    def _slurm_conf(self) -> str:
        user = pwd.getpwuid(os.getuid()).pw_name
        settings = {
            "ClusterName": "tests", "SlurmctldHost": "ctl", "SlurmUser": user, "SlurmdUser": user,
            "AuthType": "auth/munge", "AuthInfo": f"socket={self.folder}/munge.socket", "CredType": "cred/munge",
            "StateSaveLocation": f"{self.folder}/state", "SlurmdSpoolDir": f"{self.folder}/spool-%n",
            "SlurmctldPidFile": f"{self.folder}/slurmctld.pid", "SlurmdPidFile": f"{self.folder}/slurmd-%n.pid",
            "SlurmctldLogFile": f"{self.folder}/slurmctld.log", "SlurmdLogFile": f"{self.folder}/slurmd-%n.log",
            "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none", "SwitchType": "switch/none",
            "MpiDefault": "none", "SlurmdParameters": "config_overrides", "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU", "ReturnToService": "2", "KillWait": "5", "SlurmdTimeout": "20",
            "InactiveLimit": "0", "MinJobAge": "3600", "PropagateResourceLimits": "NONE",
            "AccountingStorageType": "accounting_storage/none", "JobAcctGatherType": "jobacct_gather/none",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0",
        }  # fmt: skip
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines += [f"NodeName={name} CPUs={CPUS} RealMemory={MEMORY_MB}" for name in self.nodes]
        lines.append(f"PartitionName=batch Nodes={','.join(self.nodes)} Default=YES State=UP MaxTime=INFINITE")
        return "\n".join(lines) + "\n"


def wait_until(condition: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
    """Poll until `condition` holds; fails with `what()` was waited for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what()}"
        time.sleep(0.1)


def read_steps(run: Path) -> list[int]:
    """Steps in a run's metrics.jsonl, whole lines only."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]
