"""The first law: one step's gradient is that of the stated loss over the global batch, whatever ranks and chunks.

Real shards, loader with augmentation, towers, gather, gradient cache and DeepSpeed ZeRO 2 against autograd on the whole
batch in one process, without cache, with the loss written from its formula.
"""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.shards import ShardedDataset
from pretrain.collectives import World
from pretrain.config import RunConfig
from pretrain.data.batch import Batch
from pretrain.data.loader import TrainLoader
from pretrain.engine import Engine
from pretrain.grad_cache import GradCache
from pretrain.model import PretrainModel
from pretrain.objectives import Objective
from pretrain.randomness import keyed_random
from pretrain.towers.build import parameter_groups
from tests.ranks import run_ranks
from tests.test_objectives import reference_gram, reference_infonce

GLOBAL_BATCH, STEP, POSITION = 8, 7, 40
TOLERANCE = 1e-6  # fp32: sums in another order


def run_config(dataset: str, objective: str, chunk: int, dropout: bool) -> RunConfig:
    encoder: dict[str, Any] = {"width": 16, "depth": 1, "num_heads": 2, "dropout": 0.2 if dropout else 0.0}
    return RunConfig.model_validate(
        {
            "run_dir": "unused",
            "seed": 3,
            "data": {"train": {"path": dataset, "split": "train"}, "window_s": 1.0, "num_workers": 0},
            "towers": {
                "video": {
                    "encoder": {**encoder, "patch_dropout": 0.5 if dropout else 0.0},
                    "num_frames": 2,
                    "size_px": 32,
                },
                "audio": {"encoder": {**encoder, "time_stride": 8}, "num_mels": 32, "hop_s": 0.02},
                "text": {"encoder": encoder, "max_tokens": 16},
            },
            "embedding_dim": 12,
            "objective": [{"name": objective, "label_smoothing": 0.1}],
            "schedule": {"num_steps": 10},
            "train": {"global_batch": GLOBAL_BATCH, "chunk": chunk, "zero_stage": 2, "grad_clip": 0.0},
        }
    )


def local_batch(config: RunConfig, world: World) -> Batch:
    """This rank's rows of one global batch, with unequal masks; audio is missing from the whole second half."""
    dataset = ShardedDataset(config.data.train.path, "train")
    loader = TrainLoader(
        dataset, config.data, config.towers, global_batch=GLOBAL_BATCH, seed=config.seed, rank=world.rank,
        world=world.size, start_position=POSITION,
    )  # fmt: skip
    batch = next(iter(loader))
    loader.close()
    kept = {
        "video": torch.tensor([1, 1, 0, 1, 1, 1, 1, 0], dtype=torch.bool),
        "audio": torch.tensor([1, 0, 1, 1, 0, 0, 0, 0], dtype=torch.bool),
        "text": torch.tensor([1, 1, 1, 1, 1, 0, 1, 1], dtype=torch.bool),
    }
    rows = slice(world.rank * batch.num_samples, (world.rank + 1) * batch.num_samples)
    return replace(batch, present={name: mask & kept[name][rows] for name, mask in batch.present.items()})


def true_gradient(config: RunConfig, chunk: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient by name: all samples in one graph, the loss in float64 from its definition.

    With dropout, each micro-chunk of `chunk` samples goes through the towers under its own draws.
    """
    model = PretrainModel(config).train()
    batch = local_batch(config, World())
    parts = []
    for number, start in enumerate(range(0, GLOBAL_BATCH, chunk)):
        inputs, present = batch.chunk(start, start + chunk)
        draws = partial(keyed_draws, config.seed, f"{number}.0")
        parts.append(model(inputs, present, draws)[0])
    vectors = {name: torch.cat([part[name] for part in parts]).double() for name in config.towers.names}
    objective = model.objective.parts[0]
    assert isinstance(objective, Objective)
    temperature = objective.temperature(objective.scalars(), vectors["text"])[0]
    reference = {"gram": reference_gram, "infonce": reference_infonce}[objective.name]
    loss = reference(vectors, batch.present, batch.ids, temperature, 0.1)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), {name: torch.zeros(1) if grad is None else grad for name, grad in gradients.items()}


def keyed_draws(seed: int, number: str, tower: str) -> AbstractContextManager[None]:
    """The random draws of a tower for a global micro-chunk."""
    return keyed_random(seed, STEP, tower, number)


class ForgetfulWorld(World):
    """Gathers without gradient, as published trainers do."""

    def gather_rows(self, local: Tensor) -> Tensor:
        return super().gather_rows(local.detach())


def differences(config: RunConfig, world: World, chunk_of_draws: int) -> dict[str, float]:
    """|g - g0| / |g0| over all parameters, the worst parameter by its own size, and the difference in loss."""
    loss, wanted = true_gradient(config, chunk_of_draws)
    model = PretrainModel(config)
    engine = Engine(model, parameter_groups(model, 0.05), config, world)
    engine.train(True)
    cache = GradCache(engine=engine, world=world, chunk=config.train.chunk, seed=config.seed)
    metrics = cache.backward(local_batch(config, world), STEP)
    found = {name: engine.full_gradient(parameter).double() for name, parameter in engine.trainable()}
    engine.step(1e-3)
    engine.close()
    return {
        **compare(found, wanted),
        "loss": abs(metrics["loss"] - loss) / loss,
        "reductions": engine.num_reductions,
    }


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative difference over all parameters, and the worst parameter's against its own size (or 1e-3 of all)."""
    assert list(found) == list(wanted)
    size = torch.stack([gradient.double().norm() for gradient in wanted.values()]).norm()
    errors = {name: (found[name].double() - wanted[name].double()).norm() for name in wanted}
    worst = max((error / max(wanted[name].norm().item(), 1e-3 * size)).item() for name, error in errors.items())
    return {"gradient": (torch.stack(list(errors.values())).norm() / size).item(), "worst": worst}


def check_cells(world: World, dataset: str) -> dict[str, dict[str, float]]:
    """All cells of this number of ranks."""
    found = {}
    for objective, chunk in itertools.product(("gram", "infonce"), (1, 3, GLOBAL_BATCH)):
        config = run_config(dataset, objective, chunk, dropout=False)
        found[f"{objective} chunk {chunk}"] = differences(config, world, GLOBAL_BATCH)
        if world.size > 1 and chunk == 3:
            forgetful = ForgetfulWorld(rank=world.rank, size=world.size)
            found[f"{objective} gathered without gradient"] = differences(config, forgetful, GLOBAL_BATCH)
        config = run_config(dataset, objective, 2, dropout=True)
        found[f"{objective} dropout"] = differences(config, world, 2)
        found[f"{objective} other draws"] = differences(config, world, GLOBAL_BATCH)
    return found


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradient_of_a_step_is_that_of_the_global_batch(tmp_path: Path, small_dataset: Path, size: int) -> None:
    for rank in run_ranks("tests.test_exactness:check_cells", size, tmp_path, str(small_dataset)):
        for cell, errors in rank.items():
            if cell.endswith(("gathered without gradient", "other draws")):
                assert errors["gradient"] > 1e-2, f"{cell} must be caught: {errors}"
                continue
            assert errors["gradient"] <= TOLERANCE, (cell, errors)
            assert errors["worst"] <= 2 * TOLERANCE, (cell, errors)
            assert errors["loss"] <= TOLERANCE, (cell, errors)
            assert errors["reductions"] == 1, (cell, errors)
