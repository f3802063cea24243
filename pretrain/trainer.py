"""The training run: build or resume, then one loop."""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from data_pipeline.settings import UserError
from data_pipeline.shards import ShardedDataset, publish
from pretrain import checkpoint
from pretrain.checkpoint import Progress
from pretrain.collectives import World
from pretrain.config import RunConfig
from pretrain.data.batch import Batch
from pretrain.data.loader import TrainLoader
from pretrain.engine import Engine
from pretrain.evaluate import validation_score
from pretrain.grad_cache import GradCache
from pretrain.identity import Identity, check_identity, differences
from pretrain.kept_embeddings import embeddings_path
from pretrain.model import PretrainModel
from pretrain.run_facts import RunFacts
from pretrain.run_lock import hold_run
from pretrain.run_log import BETWEEN_STEPS, RunLog, StageClock
from pretrain.schedule import learning_rate
from pretrain.signals import EXIT_RUN_AGAIN, StopRequest
from pretrain.towers.build import parameter_groups

REPORT_SPACING = 20  # times what making one takes


class Trainer:
    """Everything a run holds. Made from the newest whole checkpoint of `config.run_dir`, or from nothing.

    Raises:
        UserError: the data, the checkpoint or the weights to start from do not fit the config.
    """

    def __init__(self, config: RunConfig, world: World, stop: StopRequest | None = None) -> None:
        self.config, self.world = config, world
        self.run_dir = Path(config.run_dir)
        self.stop = stop or StopRequest()
        self.lock = hold_run(self.run_dir) if world.rank == 0 else None
        self.dataset = ShardedDataset(config.data.train.path, config.data.train.split)
        held_out = config.data.validation
        self.validation = ShardedDataset(held_out.path, held_out.split) if held_out else None
        self.identity = Identity.of(config, self.dataset.digest)
        self.notes: list[str] = []
        model = PretrainModel(config)
        self.progress, tensors = self._restore(model)
        self.facts = self._facts(model)
        groups = parameter_groups(model, config.optimizer.weight_decay)
        self.engine = Engine(model.to(world.device), groups, config, world)
        if tensors:
            checkpoint.load_moments(self.engine, tensors, self.progress.step)
        self.clock = StageClock(world.device)
        self.cache = GradCache(
            engine=self.engine,
            world=world,
            chunk=config.train.chunk,
            seed=config.seed,
            loss_dtype=torch.float64 if config.train.loss_precision == "fp64" else torch.float32,
            stage=self.clock.stage,
        )
        self.last_save = time.monotonic()
        self.next_report = 0.0  # of the monotonic clock

    def _restore(self, model: PretrainModel) -> tuple[Progress, dict[str, Tensor]]:
        """Weights into `model`; progress and the other tensors of the checkpoint that the run continues from."""
        found, self.notes = checkpoint.newest_whole(self.run_dir)
        if found is None:
            if self.config.init_from is not None:
                source = checkpoint.locate(Path(self.config.init_from), "last")
                checkpoint.load_weights(model, checkpoint.load_tensors(source), source)
                self.notes.append(f"weights from {source}")
            return Progress(), {}
        description = checkpoint.read_description(found)
        check_identity(found, description["identity"], self.identity)
        tensors = checkpoint.load_tensors(found)
        checkpoint.load_weights(model, tensors, found)
        self.notes.append(f"resumed from {found}")
        return Progress(**description["progress"]), tensors

    def _facts(self, model: PretrainModel) -> RunFacts:
        """Counted before ZeRO takes the parameters apart."""
        parts = dict.fromkeys((*self.config.towers.names, "objective"), 0)
        for name, parameter in model.named_parameters():
            parts[name.split(".")[2] if name.startswith("towers.") else "objective"] += parameter.numel()
        device = self.world.device
        held_out = self.validation
        return RunFacts(
            num_ranks=self.world.size,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            parameters=parts,
            num_trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            num_train_samples=len(self.dataset),
            num_validation_samples=None if held_out is None else min(len(held_out), self.config.validation.max_samples),
        )

    def run(self) -> int:
        """Train to the last step of the schedule, or until asked to stop. Returns the exit code."""
        config, world = self.config, self.world
        loader = TrainLoader(
            self.dataset, config.data, config.towers, global_batch=config.train.global_batch, seed=config.seed,
            rank=world.rank, world=world.size, start_position=self.progress.position,
        )  # fmt: skip
        resumed, last = self.progress.step, config.schedule.num_steps
        if world.rank == 0:
            self.notes += changed_settings(self.run_dir, config)
            write_run_config(self.run_dir, config)
            self.facts.write(self.run_dir)
        with closing(loader), RunLog(self.run_dir, world.rank, resumed, last, config.train.log_every) as log:
            self._greet(log)
            world.barrier()  # nobody logs a step before rank 0 has cut the old log
            batches = iter(loader)
            self.engine.train(True)
            while self.progress.step < last:
                with self.clock.stage("data"):
                    batch = next(batches)
                step = self.progress.step + 1
                metrics = self.cache.backward(batch, step)
                check_finite(metrics["loss"], "loss", step)
                with self.clock.stage("step"):
                    lr = learning_rate(step - 1, config.optimizer, config.schedule)
                    grad_norm = self.engine.step(lr)
                check_finite(grad_norm, "gradient norm", step)
                self.progress = replace(self.progress, step=step, position=batch.next_position)
                stop, save, problems = self._agree(len(batch.events))
                self._log(log, batch, {**metrics, "lr": lr, "grad_norm": grad_norm, "data_problems": problems})
                validate = self.validation is not None and (step % config.validation.every_steps == 0 or step == last)
                if validate:
                    save = self._validate(log) or save
                save = save or stop or step % config.checkpoint.every_steps == 0 or step == last
                if save:
                    self._save()  # after the log, so that a kill loses no line of a saved step
                if validate or stop or step == last or (save and self.validation is None):
                    self._report(log, "finished" if step == last else "stopped" if stop else "training")
                if stop and step < last:
                    log.say(f"stopped after step {step} by {self.stop.received or 'another rank'}; run again to go on")
                    return EXIT_RUN_AGAIN
        return 0

    def _agree(self, num_problems: int) -> tuple[bool, bool, float]:
        """What all ranks do after this step: stop, save by the clock of rank 0; and the sum of data problems."""
        overdue = time.monotonic() - self.last_save > self.config.checkpoint.every_minutes * 60
        mine = [self.stop.received is not None, overdue and self.world.rank == 0, num_problems]
        stop, save, problems = self.world.sum(
            torch.tensor(mine, dtype=torch.float64, device=self.world.device)
        ).tolist()
        return stop > 0, save > 0, problems

    def _save(self) -> None:
        with self.clock.stage("checkpoint"):
            checkpoint.save_checkpoint(self.run_dir, self.engine, self.progress, self.identity, self.world)
            if self.world.rank == 0:
                checkpoint.prune(self.run_dir, self.config.checkpoint.keep_last, self.progress.best_step)
        self.last_save = time.monotonic()

    def _validate(self, log: RunLog) -> bool:
        """Score the validation split; returns whether it is the best so far, which is to be saved."""
        assert self.validation is not None
        with self.clock.stage("validation"):
            step = self.progress.step
            report, score, kept = validation_score(self.engine, self.validation, self.config, self.world, step)
        log.validation(step, report, score)
        if self.world.rank == 0:
            with self.clock.stage("report"), log.attempt(f"step {step}: embeddings were not kept"):
                kept.save(embeddings_path(self.run_dir, "validation"))
        improved = self.progress.best_score is None or score > self.progress.best_score
        if improved:
            self.progress = replace(self.progress, best_score=score, best_step=step)
        return improved

    def _report(self, log: RunLog, state: str) -> None:
        """report.html of the run so far, by rank 0; while training so rarely that it takes 5 % of the time at most."""
        started = time.monotonic()
        if self.world.rank != 0 or (state == "training" and started < self.next_report):
            return
        with self.clock.stage("report"), log.attempt(f"step {self.progress.step}: no report"):
            from pretrain.report.page import PAGE, write_report

            write_report([self.run_dir], self.run_dir / PAGE, state=state)
        now = time.monotonic()
        self.next_report = now + REPORT_SPACING * (now - started)

    def _log(self, log: RunLog, batch: Batch, metrics: dict[str, float]) -> None:
        step, times = self.progress.step, self.clock.take()
        in_step = sum(seconds for name, seconds in times.items() if name.split("/")[1] not in BETWEEN_STEPS)
        speed = self.config.train.global_batch / in_step
        log.step(step, {**metrics, "position": self.progress.position, "samples_per_s": speed, **times})
        if self.config.train.log_samples:
            log.samples(step, batch)
        log.data_problems(step, batch)

    def _greet(self, log: RunLog) -> None:
        """Derived numbers, named once."""
        config, world = self.config, self.world
        local_batch = config.train.global_batch // world.size
        for note in self.notes:
            log.say(note)
        if self.progress.step >= config.schedule.num_steps:
            log.say(f"finished at step {self.progress.step}: nothing left to do")
            return
        log.say(
            f"{world.size} ranks x {local_batch} samples = global batch {config.train.global_batch}, "
            f"{math.ceil(local_batch / config.train.chunk)} gradient-cache chunks a step, "
            f"ZeRO stage {config.train.zero_stage}, {config.train.precision}, "
            f"{self.facts.num_trained_parameters:,} trained parameters, "
            f"{len(self.dataset):,} training samples; steps {self.progress.step + 1} to {config.schedule.num_steps}"
        )


def check_finite(value: float, what: str, step: int) -> None:
    """Stop before a value that is not a number reaches a checkpoint.

    Raises:
        UserError: on every rank alike, because `value` is the same on all.
    """
    if not math.isfinite(value):
        raise UserError(
            f"step {step}: the {what} is {value}; nothing was saved after step {step - 1}: lower optimizer.lr"
        )


def changed_settings(run: Path, config: RunConfig) -> list[str]:
    """A line for each key that differs from the run's last start, where a run goes on with other settings."""
    try:
        before = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return []
    return [f"changed since the last start: {line}" for line in differences("", before, config.model_dump(mode="json"))]


def write_run_config(run: Path, config: RunConfig) -> None:
    """Write the resolved configuration to RUN/config.yaml."""
    run.mkdir(parents=True, exist_ok=True)
    partial = run / ".config.yaml.partial"
    partial.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    publish(partial, run / "config.yaml")
