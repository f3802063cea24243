"""A run at one of its steps, ready to make the next: data, model, engine, gradient cache. Writes nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch

from data_pipeline.shards import ShardCache, ShardedDataset, ShardInfo, shards_digest
from pretrain.collectives import World
from pretrain.config import RunConfig
from pretrain.data.batch import Batch
from pretrain.data.loader import TrainLoader
from pretrain.data.pins import Pin, current_pins, open_pinned, pins_digest, read_pins
from pretrain.engine import Engine
from pretrain.grad_cache import GradCache
from pretrain.identity import Identity
from pretrain.model import PretrainModel
from pretrain.resume import restore
from pretrain.run_facts import RunFacts
from pretrain.run_log import StageClock
from pretrain.schedule import learning_rate
from pretrain.towers.build import parameter_groups


class Session:
    """What a step needs. `progress` counts the steps made.

    Args:
        source: the checkpoint to go on from; None: the run begins.
        pins: the shards to train on; None: those that the run keeps to, or that are there.

    Raises:
        UserError: the data, the checkpoint or the weights to start from do not fit the config.
    """

    def __init__(self, config: RunConfig, world: World, source: Path | None, pins: Sequence[Pin] | None = None) -> None:
        self.config, self.world = config, world
        if pins is None:
            pins = read_pins(Path(config.run_dir)) or current_pins(config.data)
        self.dataset = open_pinned(pins, config.data)
        held_out, cache = config.data.validation, ShardCache.of(config.data.cache_dir, config.data.cache_gib)
        self.validation = ShardedDataset(held_out.path, held_out.split, cache=cache) if held_out else None
        self.identity = Identity.of(config, pins_digest(pins))
        model = PretrainModel(config)
        start = restore(config, model, self.identity, source)
        self.progress, self.notes = start.progress, start.notes
        self._keep_own_best()
        # Counted before ZeRO takes the parameters apart.
        num_held_out = None if self.validation is None else len(self.validation)
        self.facts = RunFacts.of(model, config, world, len(self.dataset), num_held_out)
        groups = parameter_groups(model, config.optimizer.weight_decay)
        self.engine = Engine(model.to(world.device), groups, config, world)
        if start.moments is not None:
            self.engine.set_moments(start.moments, self.progress.num_updates)
        self.clock = StageClock(world.device)
        self.cache = GradCache(
            engine=self.engine,
            world=world,
            chunk=config.train.chunk,
            seed=config.seed,
            loss_dtype=torch.float64 if config.train.loss_precision == "fp64" else torch.float32,
            stage=self.clock.stage,
        )

    def _keep_own_best(self) -> None:
        """Forget a best score that measured something else: other samples, another objective or model.

        Its checkpoint stays the best until the next validation.
        """
        if self.validation is None:
            return
        held_out, most = self.validation, self.config.validation.max_samples
        model = [self.identity.towers, self.identity.embedding_dim, self.identity.objective]
        facts = [_digest_of_first(held_out.shards, most), most, *model]
        measured = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        before, self.progress = self.progress, replace(self.progress, best_of=measured)
        if before.best_step is not None and before.best_of not in (None, measured):
            self.progress = replace(self.progress, best_score=None)
            self.notes.append(
                f"validation measures something else now: step {before.best_step} is the best until the next one"
            )

    def loader(self) -> TrainLoader:
        """This rank's rows of the global batches that are still to come."""
        config, world = self.config, self.world
        return TrainLoader(
            self.dataset, config.data, config.towers, global_batch=config.train.global_batch, seed=config.seed,
            rank=world.rank, world=world.size, start_position=self.progress.position,
            second_view="augmented" in config.views,
        )  # fmt: skip

    def step(self, batch: Batch) -> tuple[dict[str, float], bool]:
        """Make the next step. Returns its metrics, and whether the weights changed.

        They stay as they were, on all ranks, where the loss or the gradient is not finite.
        """
        metrics = self.backward(batch)
        done, applied = self.update(batch)
        return metrics | done, applied

    def backward(self, batch: Batch) -> dict[str, float]:
        """The first half of a step: its gradient, in the engine."""
        return self.cache.backward(batch, self.progress.step + 1)

    def update(self, batch: Batch) -> tuple[dict[str, float], bool]:
        """The second half: the update, and the progress."""
        number = self.progress.step + 1
        with self.clock.stage("step"):
            lr = learning_rate(number - 1, self.config.optimizer, self.config.schedule)
            update = self.engine.step(lr)
            if update.applied:
                self._move_average()
        self.progress = replace(
            self.progress,
            step=number,
            position=batch.next_position,
            num_updates=self.progress.num_updates + update.applied,
            num_skipped=0 if update.applied else self.progress.num_skipped + 1,
        )
        return {"lr": lr, "grad_norm": update.grad_norm}, update.applied

    def _move_average(self) -> None:
        """The average follows faster at first, as in TensorFlow's ExponentialMovingAverage(num_updates=...)."""
        model = self.engine.model
        assert isinstance(model, PretrainModel)
        if self.config.train.ema_decay is not None and model.average is not None:
            made = self.progress.num_updates
            keep = min(self.config.train.ema_decay, (1 + made) / (10 + made))
            self.engine.move_average(model.average, model.towers, keep)


def _digest_of_first(shards: Sequence[ShardInfo], num_samples: int) -> str:
    """A digest of the shards that hold the first `num_samples`: not of those that are added later."""
    starts = [0, *accumulate(shard.num_samples for shard in shards)]
    return shards_digest([s for s, start in zip(shards, starts, strict=False) if start < num_samples])
