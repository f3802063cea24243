"""What came out, as a table on the terminal and as a page of Markdown."""

from __future__ import annotations

import os
import platform
import statistics
import time

import torch
from rich.table import Table

from tests.chaos.kills import DISK_FULL
from tests.chaos.series import SAME, SERIES, Chaos, Kill
from tests.chaos.start import NUM_STEPS

COLUMNS = ("kill", "series", "killed", "on", "after step", "all gone after, s", "start to next step, s")


def table(kills: list[Kill]) -> Table:
    """A row a kill."""
    found = Table(*COLUMNS)
    for number, one in enumerate(kills, 1):
        found.add_row(*cells(number, one))
    return found


def cells(number: int, one: Kill) -> list[str]:
    """A kill in words."""
    resumed = "killed again" if one.resumed_s is None else f"{one.resumed_s:.1f}"
    torn = f"{one.step}, saving" if one.torn else str(one.step)
    return [str(number), one.series, str(one.kind), str(one.topology), torn, f"{one.ended_s:.1f}", resumed]


def page(chaos: Chaos, seed: int, seconds: float) -> str:
    """The page in docs/."""
    kills = chaos.kills
    killed = sum(one.kind.what not in ("the disk", "file growth") for one in kills)
    same = [one for one in kills if one.series == SERIES[0].name]
    disk = "a tmpfs of its own" if DISK_FULL in chaos.kinds else "no file system that could be filled"
    apart = {what: f"{value:.1e}" for what, value in chaos.apart.items()}
    resumed = [one.resumed_s for one in kills if one.resumed_s is not None]
    rows = "\n".join(f"| {' | '.join(cells(number, one))} |" for number, one in enumerate(kills, 1))
    return f"""# Chaos

{len(kills)} times real runs were ended at random moments: {killed} times by SIGKILL, {len(kills) - killed} times
because nothing could be written any more. After each the same command was given again.
It took {seconds / 60:.0f} minutes.

    make chaos        # --kills {len(kills)} --seed {seed}

{time.strftime("%Y-%m-%d")}: {os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, gloo,
{disk}. Runs of {NUM_STEPS} steps, a checkpoint every 3; an epoch ends inside a batch.

- **Same topology** ({SAME}; AdamW, dropout), {len(same)} kills: weights, moments, every
  logged number but times, sample ids, and the files in the run's folder are those of a run left alone, bit by bit.
- **Other topologies** (1, 2 or 4 ranks, ZeRO 0 to 3, another chunk at every start; no dropout),
  {len(kills) - len(same)} kills: the same samples in the same order. From one process left alone, losses are at most
  {apart.get("sgd losses", "-")} (SGD) and {apart.get("adamw losses", "-")} (AdamW) apart, relative; final weights
  {apart.get("sgd weights", "-")} and {apart.get("adamw weights", "-")}, norm of the difference over the norm.
- Every sample of every epoch was drawn exactly once in each run.
- {sum(one.torn for one in kills)} kills met a checkpoint under way. The newest whole one was never older after a kill
  than before it.
- No process was left, {max(one.ended_s for one in kills):.0f} s after a kill at the latest. From a command to its first
  new step: {statistics.median(resumed):.0f} s (median).

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
{rows}
"""
