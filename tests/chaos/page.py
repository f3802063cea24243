"""docs/chaos.md, from the kills that were made."""

from __future__ import annotations

import os
import platform
import time

import torch

from tests.chaos.series import SAME, SERIES, Chaos
from tests.chaos.started_run import NUM_STEPS


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
