"""Runs that are killed again and again, and what must hold of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint import finished_checkpoints, newest_whole
from tests.chaos.kills import KINDS, fill_the_disk, kill, wait_until_gone
from tests.chaos.started_run import NUM_STEPS, Run, Topology, last_step
from tests.small_dataset import write_dataset
from tests.test_resume import drawn, losses, state, write_config

GLOBAL_BATCH, TRAIN_SAMPLES = 8, 23
CURVE_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-5  # SGD on other topologies
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
