"""What must hold of a run that was killed: it is the one that was left alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint import finished_checkpoints
from pretrain.run_log import VALIDATION, read_lines
from tests.chaos.start import NUM_STEPS, require
from tests.test_resume import drawn, losses, state

GLOBAL_BATCH, TRAIN_SAMPLES = 8, 23  # an epoch ends inside a batch
# Of the losses, and of the final weights: norm of the difference over the norm. AdamW divides by the root of the second
# moment, which blows rounding up where gradients are near zero.
TOLERANCE = {"sgd": 1e-5, "adamw": 1e-3}
PER_RANK = re.compile(r"(samples|data_problems|skipped_steps|logs)/.*")


def check_bitwise(run: Path, alone: Path) -> None:
    """On one topology: every number, every sample, every file.

    Raises:
        Fault: something differs.
    """
    _check_course(run, alone)
    require(losses(run) == losses(alone), "other numbers in metrics.jsonl")
    require(read_lines(run / VALIDATION) == read_lines(alone / VALIDATION), "other numbers in validation.jsonl")
    kept = [[path.name for path in finished_checkpoints(one)] for one in (run, alone)]
    require(kept[0] == kept[1], f"checkpoints {kept[0]} instead of {kept[1]}")
    ours, theirs = state(run), state(alone)
    require(ours.keys() == theirs.keys(), "other tensors in the last checkpoint")
    differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    require(not differing, f"other values in the last checkpoint: {differing}")
    require(files(run) == files(alone), f"other files: {sorted(files(run) ^ files(alone))}")


def check_close(run: Path, alone: Path, optimizer: str) -> dict[str, float]:
    """On other topologies: the same samples, and the same curve and weights within rounding. Returns how far apart.

    Raises:
        Fault: something differs by more.
    """
    _check_course(run, alone)
    extra = {name for name in files(run) ^ files(alone) if not PER_RANK.fullmatch(name) and "/state-" not in name}
    require(not extra, f"other files: {sorted(extra)}")
    pairs = zip(losses(run), losses(alone), strict=True)
    apart = {
        f"{optimizer} losses": max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs),
        f"{optimizer} weights": weights_apart(state(run), state(alone)),
    }
    for what, value in apart.items():
        require(value <= TOLERANCE[optimizer], f"{what} are {value:.2g} apart")
    return apart


def weights_apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Norm of the difference of all weights over their norm."""
    names = [name for name in theirs if name.startswith("weight/")]
    difference = torch.stack([(ours[name] - theirs[name]).norm() for name in names]).norm()
    return float(difference / torch.stack([theirs[name].norm() for name in names]).norm())


def files(run: Path) -> set[str]:
    """What lies in a run's folder; the names of TensorBoard's files, one a start, in one form."""
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if not path.is_dir()}
    return {"events" if name.startswith("events.out.tfevents") else name for name in names}


def _check_course(run: Path, alone: Path) -> None:
    """Every step once, the same samples, each once an epoch."""
    steps = [record["step"] for record in losses(run)]
    require(steps == list(range(1, NUM_STEPS + 1)), f"steps {steps}")
    samples: list[Any] = drawn(run)
    require(samples == drawn(alone), "other samples")
    num_epochs, begun = divmod(NUM_STEPS * GLOBAL_BATCH, TRAIN_SAMPLES)
    for epoch in range(num_epochs + 1):
        keys = [key for _, e, key in samples if e == epoch]
        wanted = TRAIN_SAMPLES if epoch < num_epochs else begun
        require(len(keys) == len(set(keys)) == wanted, f"epoch {epoch}: {len(keys)} samples, {len(set(keys))} keys")
