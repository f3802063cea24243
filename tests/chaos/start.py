"""One start of a run: its launcher, and every process that comes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.run_log import METRICS, read_lines

NUM_STEPS = 40
START_TIMEOUT_S, END_TIMEOUT_S = 300.0, 60.0
MARK = "PARALLELOTOPE_CHAOS"  # in the environment of every process of a start, whoever its parent is by now
BEGINS = ("global batch", "nothing left to do")  # what rank 0 says once it has read its checkpoint and cut the log


class Fault(AssertionError):
    """What must hold does not."""


def require(holds: object, what: str) -> None:
    """Raise a Fault unless `holds`."""
    if not holds:
        raise Fault(what)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How a start of a run is spread out."""

    ranks: int
    zero_stage: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''}, ZeRO {self.zero_stage}, chunk {self.chunk}"


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process of a start. rank: its own, or that of its parent; None: the launcher's."""

    pid: int
    role: Literal["launcher", "rank", "worker", "other"]
    rank: int | None


class Start:
    """The command that starts a run or goes on with it, under way. output: a file for what it says."""

    def __init__(self, config: Path, run: Path, topology: Topology, output: Path) -> None:
        self.run, self.topology, self.output = run, topology, output
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        self.started = time.monotonic()
        with open(output, "w") as stream:
            self.process = subprocess.Popen(
                launch_command(config, topology), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", name: value},
            )  # fmt: skip

    def wait_for_new_steps(self, count: int) -> float | None:
        """Until this start has made `count` steps, or has ended. Returns the seconds to the first, if any."""
        self._wait(lambda: any(phrase in self.said() for phrase in BEGINS))
        first = last_step(self.run)
        self._wait(lambda: last_step(self.run) > first)
        resumed_s = time.monotonic() - self.started
        self._wait(lambda: last_step(self.run) >= first + count)
        return resumed_s if last_step(self.run) > first else None

    def _wait(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not holds() and self.process.poll() is None:
            require(time.monotonic() < deadline, f"too slow:\n{self.said()}")
            time.sleep(0.01)
        require(self.process.poll() in (None, 0), f"ended with code {self.process.poll()}:\n{self.said()}")

    def said(self) -> str:
        """Its output so far."""
        return self.output.read_text(errors="replace")

    def end(self) -> int:
        """Wait until it ends of itself; its exit code."""
        try:
            return self.process.wait(timeout=START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise Fault(f"did not end:\n{self.said()}") from None

    def processes(self) -> list[Process]:
        """All that live."""
        parents: dict[int, int] = {}
        ranks: dict[int, int | None] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                if self._mark in environment and state_of(folder) not in "ZX":
                    pid = int(folder.name)
                    parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                    ranks[pid] = next((int(e[5:]) for e in environment if e.startswith("RANK=")), None)
        return [Process(pid=pid, role=self._role(pid, parents), rank=ranks[pid]) for pid in parents]

    def _role(self, pid: int, parents: dict[int, int]) -> Literal["launcher", "rank", "worker", "other"]:
        if pid == self.process.pid:
            return "launcher"
        if parents[pid] == self.process.pid:
            return "rank"
        is_fork = command_line(pid) == command_line(parents[pid])
        return "worker" if is_fork and parents.get(parents[pid]) == self.process.pid else "other"

    def wait_until_gone(self) -> None:
        """Until no process of it lives."""
        self.process.wait()
        deadline = time.monotonic() + END_TIMEOUT_S
        while left := self.processes():
            require(time.monotonic() < deadline, f"left behind: {left}")
            time.sleep(0.02)

    def close(self) -> None:
        """Leave nothing of it, whatever happened."""
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        self.process.wait()


def launch_command(config: Path, topology: Topology) -> list[str]:
    """What a user would type."""
    overrides = [f"train.zero_stage={topology.zero_stage}", f"train.chunk={topology.chunk}"]
    launch = [sys.executable, "-m", "pretrain.main", "launch", "local", str(config)]
    return [*launch, "--ranks", str(topology.ranks), *overrides]


def last_step(run: Path) -> int:
    """The last step in a run's log."""
    return max((record["step"] for record in read_lines(run / METRICS)), default=0)


def state_of(process: Path) -> str:
    """The kernel's letter for what a process does: Z for a zombie."""
    return (process / "stat").read_text().rpartition(")")[2].split()[0]


def command_line(pid: int) -> bytes:
    """How a process was started; b"" when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
