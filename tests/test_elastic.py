"""One run that changes its ranks, its ZeRO stage and its chunks as it goes: the same samples, the same state, the same
curve as one process that never stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.settings import load_settings
from pretrain.checkpoint import finished_checkpoints
from pretrain.collectives import World
from pretrain.config import RunConfig
from pretrain.engine import Engine
from pretrain.signals import EXIT_RUN_AGAIN, StopRequest
from pretrain.stored_tensors import StoredTensors
from pretrain.trainer import Trainer
from tests.ranks import run_ranks
from tests.test_resume import drawn, losses, state, towers, write_config

LEGS = [(4, 2, 2, 5), (2, 3, 4, 10), (1, 1, 1, 15), (2, 2, 2, 20)]  # ranks, ZeRO stage, chunk, last step
NUM_STEPS = LEGS[-1][-1]
EPOCH, GLOBAL_BATCH = 23, 8


class StopAt(StopRequest):
    """Asks the run to stop after a step, as a signal would."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.trainer: Trainer | None = None

    @property
    def received(self) -> str | None:  # type: ignore[override]
        """The name of a signal, once the step is made."""
        assert self.trainer is not None
        return "SIGUSR1" if self.trainer.session.progress.step >= self.step else None


def train_a_leg(world: World, argument: list[Any]) -> dict[str, float]:
    """Go on to a step; says how far what the engine holds at the start is from what the checkpoint holds."""
    path, last_step = argument
    config = load_settings(RunConfig, Path(path))
    stop = StopAt(last_step)
    stop.trainer = Trainer(config, world, stop)
    sources = finished_checkpoints(Path(config.run_dir))
    difference = largest_difference(stop.trainer.session.engine, StoredTensors(sources[-1])) if sources else 0.0
    return {"code": float(stop.trainer.run()), "difference": difference}


def largest_difference(engine: Engine, stored: StoredTensors) -> float:
    """Of any weight or moment, relative to the largest value of its tensor."""
    worst = 0.0
    for name, parameter in engine.trainable():
        held = {"weight": engine.full_weight(parameter), **engine.moments(parameter)}
        for kind, values in held.items():
            wanted = stored[f"{kind}/{name}"]
            worst = max(worst, ((values - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item())
    return worst


def run_legs(folder: Path, dataset: Path, legs: list[tuple[int, int, int, int]], **changes: Any) -> Path:
    """A run of these legs; every resume is checked."""
    run = folder / "run"
    folder.mkdir()
    for number, (ranks, stage, chunk, last) in enumerate(legs):
        train = {"global_batch": GLOBAL_BATCH, "chunk": chunk, "zero_stage": stage, "grad_clip": 1.0}
        config = write_config(
            folder / "config.yaml", dataset, run, train=train, schedule={"num_steps": NUM_STEPS, "warmup_steps": 2},
            checkpoint={"every_steps": 1000, "keep_last": 10}, validation={"every_steps": 1000}, **changes,
        )  # fmt: skip
        found = run_ranks("tests.test_elastic:train_a_leg", ranks, folder / f"leg-{number}", [str(config), last])
        for facts in found:
            assert facts["code"] == (0 if last == NUM_STEPS else EXIT_RUN_AGAIN)
            assert facts["difference"] == 0, "a resume gives each rank exactly what was saved"
    return run


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_that_changes_its_topology_is_the_run_that_does_not(
    tmp_path: Path, small_dataset: Path, optimizer: str
) -> None:
    lr = {"sgd": 1e-2, "adamw": 1e-3}[optimizer]
    changes: dict[str, Any] = {"towers": towers(dropout=0.0), "optimizer": {"name": optimizer, "lr": lr}}
    elastic = run_legs(tmp_path / "elastic", small_dataset, LEGS, **changes)
    steady = run_legs(tmp_path / "steady", small_dataset, [(1, 0, GLOBAL_BATCH, NUM_STEPS)], **changes)
    samples = drawn(elastic)
    assert samples == drawn(steady)
    for epoch in range(NUM_STEPS * GLOBAL_BATCH // EPOCH):
        keys = [key for _, e, key in samples if e == epoch]
        assert len(keys) == len(set(keys)) == EPOCH
    found, wanted = losses(elastic), losses(steady)
    assert [record["step"] for record in found] == list(range(1, NUM_STEPS + 1))
    apart = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, wanted, strict=True))
    assert apart <= (1e-6 if optimizer == "sgd" else 1e-3)
    if optimizer == "sgd":
        ours, theirs = state(elastic), state(steady)
        names = [name for name in theirs if name.startswith("weight/")]
        size = torch.stack([theirs[name].norm() for name in names]).norm()
        assert torch.stack([(ours[name] - theirs[name]).norm() for name in names]).norm() / size <= 1e-6
