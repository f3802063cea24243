"""Kills real runs at random moments, starts them again, and compares what comes out with a run that was left alone.

    python -m tests.chaos [--kills 30] [--seed 0] [--folder DIR] [--write docs/chaos.md]

Two series: on the same topology the run must be bitwise the one left alone; on topologies that change at every start it
must draw the same samples and follow the same curve. Exit code 1 if anything is not so.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pretrain.checkpoint import checkpoints_folder, finished_checkpoints, newest_whole
from pretrain.run_log import METRICS, read_lines
from tests.small_dataset import write_dataset
from tests.test_resume import command, drawn, losses, mounted, state, write_config

NUM_STEPS, GLOBAL_BATCH, TRAIN_SAMPLES = 40, 8, 23
START_TIMEOUT_S, END_TIMEOUT_S = 240.0, 60.0
CURVE_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-5  # SGD on other topologies
DISK = "64m"


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How a start of a run is spread out."""

    ranks: int
    zero_stage: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.ranks} ranks, ZeRO {self.zero_stage}, chunk {self.chunk}"


SAME = Topology(ranks=2, zero_stage=2, chunk=1)


@dataclass(frozen=True, kw_only=True)
class Series:
    """Runs of one kind. changes: to the config of tests.test_resume."""

    name: str
    changes: dict[str, Any]
    same_topology: bool


def encoders(dropout: float) -> dict[str, Any]:
    encoder = {"width": 16, "depth": 1, "num_heads": 2, "dropout": dropout}
    return {
        "video": {"encoder": encoder, "num_frames": 2, "size_px": 32},
        "audio": {"encoder": {**encoder, "time_stride": 8}, "num_mels": 32, "hop_s": 0.02},
        "text": {"encoder": encoder, "max_tokens": 16},
    }


SERIES = (
    Series(name="same topology", changes={"towers": encoders(0.1)}, same_topology=True),
    Series(
        name="other topologies",
        changes={"towers": encoders(0.0), "optimizer": {"name": "sgd", "lr": 1e-2}},
        same_topology=False,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill and the start after it. ended_s: from the kill until no process was left. resumed_s: from the next start
    to its first new step."""

    series: str
    how: str
    topology: Topology
    step: int
    ended_s: float
    resumed_s: float = float("nan")


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


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for_a_save(start: Run) -> None:
    """Until a checkpoint is under way, or the run ends."""
    folder = checkpoints_folder(start.run)
    while not any(folder.glob(".step-*.partial")) and start.process.poll() is None:
        time.sleep(0.0005)


def kill(start: Run, how: str, choice: random.Random) -> None:
    """Kill what `how` says, now."""
    if how.endswith("while saving"):
        wait_for_a_save(start)
        time.sleep(choice.random() * 0.01)
    who = start.processes()
    ranks = [pid for pid, name in who.items() if name.startswith("rank")]
    workers = [pid for pid, name in who.items() if name.startswith("worker")]
    if how.startswith("everything"):
        kill_all(list(who))
    elif how.startswith("one rank"):
        victim = choice.choice(ranks)
        kill_all([victim])
        code = start.process.wait(timeout=END_TIMEOUT_S)
        if code != 0:  # 0: the victim had just finished
            assert code == 128 + signal.SIGKILL, (code, start.said())
            assert f"{who[victim]} of" in start.said() or start.topology.ranks == 1, start.said()
    elif how == "the launcher":
        kill_all([start.process.pid])
    else:
        kill_all([choice.choice(workers)])
        code = start.process.wait(timeout=END_TIMEOUT_S)
        assert code != 0 or last_step(start.run) == NUM_STEPS, start.said()


def fill_the_disk(start: Run, choice: random.Random) -> None:
    """Leave no room, until the run has given up; then make room again."""
    ballast = start.run.parent / "ballast"
    try:
        with suppress(OSError), open(ballast, "wb", buffering=0) as stream:
            while True:
                stream.write(bytes(1 << 16))
        code = start.process.wait(timeout=START_TIMEOUT_S)
        said = start.said()
        assert code == 2, (code, said)
        assert any(line.startswith("error: ") and "No space left on device" in line for line in said.splitlines()), said
    finally:
        ballast.unlink(missing_ok=True)


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + END_TIMEOUT_S
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"left behind: {alive}"
        time.sleep(0.02)


KINDS = (
    "everything", "everything while saving", "one rank", "one rank while saving", "the launcher", "a decoding process",
    "the disk is full",
)  # fmt: skip


def random_topology(choice: random.Random) -> Topology:
    ranks = choice.choice([1, 2, 4])
    chunks = [chunk for chunk in (1, 2, 4) if (GLOBAL_BATCH // ranks) % chunk == 0]
    return Topology(ranks=ranks, zero_stage=choice.randrange(4), chunk=choice.choice(chunks))


class Chaos:
    """Series of kills in one folder."""

    def __init__(self, folder: Path, seed: int, can_fill: bool, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.choice = random.Random(seed)
        self.kinds = [kind for kind in KINDS if can_fill or kind != "the disk is full"]
        self.dataset = write_dataset(folder / "data", {"train": TRAIN_SAMPLES, "val": 9})
        self.kills: list[Kill] = []
        self.numbers: dict[str, float] = {}
        self._bag: list[str] = []

    def next_kind(self) -> str:
        """Every kind as often as any other, in random order."""
        if not self._bag:
            self._bag = self.choice.sample(self.kinds, len(self.kinds))
        return self._bag.pop()

    def series(self, series: Series, num_kills: int) -> None:
        """Kill runs of a series `num_kills` times in all; compare each with one that was left alone."""
        alone, config = self._new_run(series, "alone")
        reference = SAME if series.same_topology else Topology(ranks=1, zero_stage=0, chunk=GLOBAL_BATCH)
        Run(config, alone, reference).finish()
        done = 0
        while done < num_kills:
            run, config = self._new_run(series, f"killed-{done}")
            while done < num_kills and last_step(run) < NUM_STEPS - 5:
                self._one_kill(series, config, run)
                done += 1
            last = Run(config, run, self._topology(series))
            _, resumed_s = last.wait_for_new_steps(1)
            last.finish()
            self._remember(resumed_s)
            self._compare(series, run, alone)

    def _topology(self, series: Series) -> Topology:
        return SAME if series.same_topology else random_topology(self.choice)

    def _new_run(self, series: Series, name: str) -> tuple[Path, Path]:
        folder = self.folder / f"{series.name} {name}"
        folder.mkdir()
        config = write_config(
            folder / "config.yaml", self.dataset, folder / "run", schedule={"num_steps": NUM_STEPS, "warmup_steps": 2},
            train={"global_batch": GLOBAL_BATCH}, checkpoint={"every_steps": 3, "keep_last": 3},
            validation={"every_steps": 7}, **series.changes,
        )  # fmt: skip
        return folder / "run", config

    def _one_kill(self, series: Series, config: Path, run: Path) -> None:
        how, topology = self.next_kind(), self._topology(series)
        start = Run(config, run, topology)
        _, resumed_s = start.wait_for_new_steps(self.choice.randint(1, 7))
        self._remember(resumed_s)
        time.sleep(self.choice.random() * 0.2)
        pids = list(start.processes())
        killed = time.monotonic()
        if how == "the disk is full":
            fill_the_disk(start, self.choice)
        else:
            kill(start, how, self.choice)
        wait_until_gone([*pids, *start.processes()])
        start.process.wait()
        ended_s = time.monotonic() - killed
        step = last_step(run)
        self.kills.append(Kill(series=series.name, how=how, topology=topology, step=step, ended_s=ended_s))
        found, notes = newest_whole(run)
        assert not notes, f"a kill left a damaged checkpoint: {notes}"
        assert found is not None or step <= 2 * 3, f"no checkpoint after step {step}"
        self.say(f"kill {len(self.kills)}: {how}, {topology}, step {step}, gone after {ended_s:.1f} s")

    def _remember(self, resumed_s: float) -> None:
        """Seconds from this start to its first step: of the kill before it."""
        if self.kills and self.kills[-1].resumed_s != self.kills[-1].resumed_s:
            last = self.kills[-1]
            self.kills[-1] = replace(last, resumed_s=resumed_s)

    def _compare(self, series: Series, run: Path, alone: Path) -> None:
        """What must hold of a run that was killed."""
        samples = drawn(run)
        assert samples == drawn(alone), "other samples"
        for epoch in range(NUM_STEPS * GLOBAL_BATCH // TRAIN_SAMPLES):
            keys = [key for _, e, key in samples if e == epoch]
            assert len(keys) == len(set(keys)) == TRAIN_SAMPLES, f"epoch {epoch}"
        leftovers = [path for path in run.rglob("*.partial") if path.is_file() or path.is_dir()]
        assert not leftovers, leftovers
        found, wanted = losses(run), losses(alone)
        assert [record["step"] for record in found] == list(range(1, NUM_STEPS + 1))
        ours, theirs = state(run), state(alone)
        if series.same_topology:
            assert found == wanted, "other numbers in metrics.jsonl"
            assert [p.name for p in finished_checkpoints(run)] == [p.name for p in finished_checkpoints(alone)]
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "other weights or moments"
            return
        curve = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, wanted, strict=True))
        names = [name for name in theirs if name.startswith("weight/")]
        size = torch.stack([theirs[name].norm() for name in names]).norm()
        weights = float(torch.stack([(ours[name] - theirs[name]).norm() for name in names]).norm() / size)
        for name, value, limit in (("loss", curve, CURVE_TOLERANCE), ("weights", weights, WEIGHT_TOLERANCE)):
            self.numbers[name] = max(self.numbers.get(name, 0.0), value)
            assert value <= limit, f"{name} {value:.2g} apart"


@contextmanager
def a_folder(parent: Path | None) -> Iterator[tuple[Path, bool]]:
    """A folder for the runs, and whether its disk may be filled: a small file system of its own, if that is allowed."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        disk = Path(name) / "disk"
        if not mounted(disk, DISK):
            yield disk, False
            return
        try:
            yield disk, True
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def page(chaos: Chaos, seed: int, seconds: float) -> str:
    """The page in docs/."""
    same = sum(kill.series == SERIES[0].name for kill in chaos.kills)
    other = len(chaos.kills) - same
    curve, weights = (chaos.numbers.get(name, 0.0) for name in ("loss", "weights"))
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, gloo"
    text = f"""# Chaos

{len(chaos.kills)} kills at random moments, by SIGKILL or a full disk, in {seconds / 60:.0f} minutes.

    make chaos        # seed {seed}

{time.strftime("%Y-%m-%d")}: {machine}. Runs of {NUM_STEPS} steps with a checkpoint every 3; an epoch ends
inside a batch. After every kill no process was left, the newest checkpoint was whole, and the same command went on.

- **Same topology** ({SAME}; AdamW, dropout), {same} kills: weights, moments, every logged
  number but times, and sample ids are bitwise those of a run left alone.
- **Other topologies** (1, 2 or 4 ranks, ZeRO 0 to 3, other chunks at every start; SGD), {other} kills:
  the same samples in the same order; losses at most {curve:.1e} (relative) and final weights {weights:.1e} (norm of the
  difference over the norm) from one process left alone.
- Every sample of every epoch was drawn exactly once in each of them.

| kill | series | killed | on | after step | all gone after, s | start to next step, s |
|---|---|---|---|---|---|---|
"""
    for number, one in enumerate(chaos.kills, 1):
        cells = (number, one.series, one.how, one.topology, one.step, f"{one.ended_s:.1f}", f"{one.resumed_s:.1f}")
        text += f"| {' | '.join(map(str, cells))} |\n"
    return text


def main(argv: list[str] | None = None) -> int:
    """Run all; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to make the runs' folder; default: where the system has it")
    parser.add_argument("--write", type=Path, help="write the page about it here")
    arguments = parser.parse_args(argv)
    console = Console(highlight=False)
    started = time.monotonic()
    with a_folder(arguments.folder) as (folder, can_fill):
        if not can_fill:
            console.print("the disk is not filled: mounting a small file system needs root")
        chaos = Chaos(folder, arguments.seed, can_fill, lambda line: print(line, file=sys.stderr, flush=True))
        for number, series in enumerate(SERIES):
            chaos.series(series, (arguments.kills + 1 - number) // len(SERIES))
    table = Table("series", "killed", "on", "step", "all gone after", "start to next step")
    for one in chaos.kills:
        table.add_row(
            one.series, one.how, str(one.topology), str(one.step), f"{one.ended_s:.1f} s", f"{one.resumed_s:.1f} s"
        )
    console.print(table)
    console.print(f"{len(chaos.kills)} kills, seed {arguments.seed}: every run is the one left alone; {chaos.numbers}")
    if arguments.write is not None:
        arguments.write.write_text(page(chaos, arguments.seed, time.monotonic() - started), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
