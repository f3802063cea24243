"""One start of a real run: its launcher, its ranks and their decoding processes, found by the kernel's records."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain.run_log import METRICS, read_lines
from tests.test_resume import command

NUM_STEPS = 40
START_TIMEOUT_S, END_TIMEOUT_S = 240.0, 60.0


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How a start of a run is spread out."""

    ranks: int
    zero_stage: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.ranks} ranks, ZeRO {self.zero_stage}, chunk {self.chunk}"


class Run:
    """One start of a run: its launcher and all its processes."""

    def __init__(self, config: Path, run: Path, topology: Topology) -> None:
        self.run, self.topology = run, topology
        self.output = run.with_name(f"{run.name}-output.txt")
        self.started = time.monotonic()
        with open(self.output, "w") as stream:
            self.process = subprocess.Popen(
                launch_command(config, topology), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def wait_for_new_steps(self, count: int) -> tuple[int, float]:
        """Until `count` steps were made by this start. Returns the last step and the seconds to the first of them."""
        self._wait(lambda: "global batch" in self.said() or "nothing left to do" in self.said())
        first = last_step(self.run)
        self._wait(lambda: last_step(self.run) > first)
        resumed_s = time.monotonic() - self.started
        self._wait(lambda: last_step(self.run) >= min(first + count, NUM_STEPS))
        return last_step(self.run), resumed_s

    def _wait(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not holds():
            assert self.process.poll() is None or holds(), self.said()
            assert time.monotonic() < deadline, f"too slow:\n{self.said()}"
            time.sleep(0.01)

    def said(self) -> str:
        """Its output so far."""
        return self.output.read_text(errors="replace")

    def finish(self) -> None:
        """Let it come to its end."""
        code = self.process.wait(timeout=START_TIMEOUT_S)
        assert code == 0, self.said()

    def processes(self) -> dict[int, str]:
        """pid -> "launcher", "rank 0", "worker of rank 0"."""
        found = {self.process.pid: "launcher"}
        for pid in descendants(self.process.pid):
            with suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = next((e[5:].decode() for e in environment if e.startswith(b"RANK=")), "?")
                parent = found.get(parent_of(pid), "")
                found[pid] = f"worker of rank {rank}" if "rank" in parent else f"rank {rank}"
        return found


def launch_command(config: Path, topology: Topology) -> list[str]:
    overrides = [f"train.zero_stage={topology.zero_stage}", f"train.chunk={topology.chunk}"]
    return [*command(config, topology.ranks), *overrides]


def last_step(run: Path) -> int:
    return max((record["step"] for record in read_lines(run / METRICS)), default=0)


def descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from descendants(int(child))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
