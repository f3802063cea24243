"""Runs that are killed again and again, and compared with one that was left alone."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.checkpoint import finished_checkpoints, newest_whole
from tests.chaos.comparison import GLOBAL_BATCH, TRAIN_SAMPLES, check_bitwise, check_close
from tests.chaos.kills import DISK_FULL, KINDS, MOST_STEPS, Kind, kill, unfinished, wait_for_the_moment
from tests.chaos.start import NUM_STEPS, Start, Topology, last_step, require
from tests.small_dataset import write_dataset
from tests.test_resume import towers, write_config

SAME = Topology(ranks=2, zero_stage=2, chunk=1)
ALONE = Topology(ranks=1, zero_stage=0, chunk=GLOBAL_BATCH)
FIRST_START_S = 15.0  # a guess, until one was measured


@dataclass(frozen=True, kw_only=True)
class Series:
    """Runs of one kind. Dropout follows the chunks, so it is off where they change."""

    name: str
    same_topology: bool
    optimizer: dict[str, Any]
    share: int  # of the kills

    @property
    def changes(self) -> dict[str, Any]:
        """To the config of tests.test_resume."""
        return {"towers": towers(dropout=0.1 if self.same_topology else 0.0), "optimizer": self.optimizer}


SERIES = (
    Series(name="same topology", same_topology=True, optimizer={"name": "adamw"}, share=2),
    Series(name="other topologies, SGD", same_topology=False, optimizer={"name": "sgd", "lr": 1e-2}, share=1),
    Series(name="other topologies, AdamW", same_topology=False, optimizer={"name": "adamw"}, share=1),
)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill and the start after it.

    step: the last one in the log. ended_s: from the kill until no process was left. resumed_s: from the next command to
    its first new step; None: it was killed before. torn: a checkpoint was under way.
    """

    series: str
    kind: Kind
    topology: Topology
    step: int
    ended_s: float
    torn: bool
    resumed_s: float | None = None


class Chaos:
    """Series of kills in one folder.

    Args:
        disk: where the runs lie; may be filled up where `can_fill`. outputs: where what they say goes.
    """

    def __init__(self, disk: Path, outputs: Path, seed: int, can_fill: bool, say: Callable[[str], None]) -> None:
        self.disk, self.outputs, self.say = disk, outputs, say
        self.choice = random.Random(seed)
        self.kinds = [kind for kind in KINDS if can_fill or kind != DISK_FULL]
        self.dataset = write_dataset(outputs / "data", {"train": TRAIN_SAMPLES, "val": 9})
        self.kills: list[Kill] = []
        self.apart: dict[str, float] = {}
        self.usual_start_s = FIRST_START_S
        self._bag: list[Kind] = []

    def run(self, num_kills: int) -> None:
        """Kill `num_kills` times in all.

        Raises:
            Fault: something does not hold.
        """
        shares, begun = sum(series.share for series in SERIES), 0
        for series in SERIES:
            until = begun + series.share
            self._series(series, num_kills * until // shares - num_kills * begun // shares)
            begun = until

    def _series(self, series: Series, num_kills: int) -> None:
        if num_kills == 0:
            return
        alone, config = self._new_run(series, "alone")
        self._finish(config, alone, SAME if series.same_topology else ALONE)
        self.say(f"{series.name}: a run was left alone; {num_kills} kills")
        goal = len(self.kills) + num_kills
        while len(self.kills) < goal:
            run, config = self._new_run(series, f"killed after {len(self.kills)}")
            while len(self.kills) < goal and last_step(run) < NUM_STEPS - 2 * MOST_STEPS:
                self._one_kill(series, config, run)
            self._remember(self._finish(config, run, self._topology(series)))
            self._compare(series, run, alone)
            shutil.rmtree(run.parent)  # the disk is small
        shutil.rmtree(alone.parent)

    def _topology(self, series: Series) -> Topology:
        if series.same_topology:
            return SAME
        ranks = self.choice.choice([1, 2, 4])
        chunks = [chunk for chunk in (1, 2, 4) if (GLOBAL_BATCH // ranks) % chunk == 0]
        return Topology(ranks=ranks, zero_stage=self.choice.randrange(4), chunk=self.choice.choice(chunks))

    def _next_kind(self) -> Kind:
        """Every kind as often as any other, in random order."""
        if not self._bag:
            self._bag = self.choice.sample(self.kinds, len(self.kinds))
        return self._bag.pop()

    def _new_run(self, series: Series, name: str) -> tuple[Path, Path]:
        folder = self.disk / f"{series.name} {name}"
        folder.mkdir()
        config = write_config(
            folder / "config.yaml", self.dataset, folder / "run", schedule={"num_steps": NUM_STEPS, "warmup_steps": 2},
            train={"global_batch": GLOBAL_BATCH}, checkpoint={"every_steps": 3, "keep_last": 3},
            validation={"every_steps": 7}, **series.changes,
        )  # fmt: skip
        return folder / "run", config

    def _start(self, config: Path, run: Path, topology: Topology) -> Start:
        return Start(config, run, topology, self.outputs / f"{run.parent.name} {len(self.kills)}.txt")

    def _finish(self, config: Path, run: Path, topology: Topology) -> float | None:
        """Let a run come to its end. Returns the seconds to its first new step."""
        with closing(self._start(config, run, topology)) as start:
            resumed_s = start.wait_for_new_steps(1)
            code = start.end()
            require(code == 0, f"ended with code {code}:\n{start.said()}")
            start.wait_until_gone()
        return resumed_s

    def _one_kill(self, series: Series, config: Path, run: Path) -> None:
        kind, topology = self._next_kind(), self._topology(series)
        old = unfinished(run)
        with closing(self._start(config, run, topology)) as start:
            self._remember(wait_for_the_moment(start, kind, self.choice, self.usual_start_s))
            before = max((step_of(path) for path in finished_checkpoints(run)), default=0)
            killed, torn = time.monotonic(), bool(unfinished(run) - old)
            hit = kill(start, kind, self.choice)
            start.wait_until_gone()
            ended_s = time.monotonic() - killed
        after = newest_step(run)
        require(after >= before, f"the newest checkpoint was of step {before}, and is of step {after} after the kill")
        if not hit:
            self.say(f"{kind}: it had ended of itself; not counted")
            self._bag.append(kind)
            return
        torn = torn or bool(unfinished(run) - old)
        step = last_step(run)
        self.kills.append(Kill(series=series.name, kind=kind, topology=topology, step=step, ended_s=ended_s, torn=torn))
        self.say(f"kill {len(self.kills)}: {kind}, {topology}, step {step}, all gone after {ended_s:.1f} s")

    def _remember(self, resumed_s: float | None) -> None:
        """Seconds from this start to its first step: of the kill before it."""
        if resumed_s is None:
            return
        self.usual_start_s = resumed_s
        if self.kills and self.kills[-1].resumed_s is None:
            self.kills[-1] = replace(self.kills[-1], resumed_s=resumed_s)

    def _compare(self, series: Series, run: Path, alone: Path) -> None:
        if series.same_topology:
            check_bitwise(run, alone)
        else:
            for what, value in check_close(run, alone, series.optimizer["name"]).items():
                self.apart[what] = max(self.apart.get(what, 0.0), value)
        self.say("compared with the run that was left alone: as it must be")


def newest_step(run: Path) -> int:
    """The step of the checkpoint that a run would go on from; 0: none.

    Raises:
        Fault: one is damaged.
    """
    found, notes = newest_whole(run)
    require(not notes, f"a kill left a damaged checkpoint: {notes}")
    return 0 if found is None else step_of(found)


def step_of(checkpoint: Path) -> int:
    """The step after which it was saved."""
    return int(checkpoint.name.removeprefix("step-"))
