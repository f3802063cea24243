"""The training run: build or resume, then one loop."""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from data_pipeline.settings import UserError
from data_pipeline.shards import publish, write_json
from pretrain.checkpoint_writer import CheckpointWriter
from pretrain.collectives import World
from pretrain.config import RunConfig
from pretrain.data.batch import Batch
from pretrain.data.pins import keep_accepted, shared_pins
from pretrain.evaluate import validation_score
from pretrain.identity import differences
from pretrain.kept_embeddings import embeddings_path
from pretrain.resume import newest_checkpoint
from pretrain.run_lock import check_shared, hold_run
from pretrain.run_log import BETWEEN_STEPS, RunLog
from pretrain.session import Session
from pretrain.signals import EXIT_RUN_AGAIN, StopRequest
from pretrain.start_notes import batch_notes
from pretrain.watchdog import watched

REPORT_SPACING = 20  # times what making one takes


class Trainer:
    """A run in its folder. Made from the newest whole checkpoint of `config.run_dir`, or from nothing.

    Raises:
        UserError: the data, the checkpoint or the weights to start from do not fit the config.
    """

    def __init__(self, config: RunConfig, world: World, stop: StopRequest | None = None) -> None:
        self.config, self.world = config, world
        self.run_dir = Path(config.run_dir)
        self.stop = stop or StopRequest()
        self.lock = hold_run(self.run_dir) if world.rank == 0 else None
        check_shared(self.run_dir, world)
        source, notes = newest_checkpoint(self.run_dir, world)
        pins, grown = shared_pins(config, world, begun=source is not None)
        self.session = Session(config, world, source, pins)
        if world.rank == 0:
            keep_accepted(config, pins)
        self.session.notes[:0] = [*notes, *grown]
        self.clock = self.session.clock
        self.writer = CheckpointWriter(config, self.session.engine, self.session.identity, world)
        self.last_save = time.monotonic()
        self.next_report = 0.0  # of the monotonic clock
        self.num_unreadable = 0  # steps in a row

    def run(self) -> int:
        """Train to the last step of the schedule, or until asked to stop. Returns the exit code."""
        config, world, session = self.config, self.world, self.session
        resumed, last = session.progress.step, config.schedule.num_steps
        self._write_facts()
        with (
            closing(session.loader()) as loader,
            closing(self.writer),
            RunLog(self.run_dir, world.rank, resumed, last, config.train.log_every) as log,
            watched(self.clock.position, config.faults.stage_timeout_s, self._who),
        ):
            self._greet(log)
            world.barrier()  # nobody logs a step before rank 0 has cut the old log
            batches = iter(loader)
            session.engine.train(True)
            while session.progress.step < last:
                with self.clock.stage("data"):
                    batch = next(batches)
                metrics, applied = session.step(batch)
                step = session.progress.step
                stop, save, written, problems, read = self._agree(batch)
                metrics |= loader.epochs_at(batch.next_position)
                self._log(log, batch, {**metrics, "data_problems": problems, "skipped": float(not applied)})
                if not applied:
                    self._bear_skipped(log, batch, metrics)
                self._bear_unreadable(problems, read)
                validate = session.validation is not None and (
                    step % config.validation.every_steps == 0 or step == last
                )
                if validate:
                    save = self._validate(log) or save
                end = stop or step == last
                save = save or end or step % config.checkpoint.every_steps == 0
                if save:
                    self._save(wait=end)
                elif written:
                    self._commit()
                if validate or end or (save and session.validation is None):
                    self._report(log, "finished" if step == last else "stopped" if stop else "training")
                if stop and step < last:
                    log.say(f"stopped after step {step} by {self.stop.received or 'another rank'}; run again to go on")
                    return EXIT_RUN_AGAIN
        return 0

    def _agree(self, batch: Batch) -> tuple[bool, bool, bool, float, float]:
        """What all ranks do after this step: stop, save by the clock of rank 0, commit what all of them have written;
        and the sums of data problems and of media (all but text, which is in the index) that were read."""
        overdue = time.monotonic() - self.last_save > self.config.checkpoint.every_minutes * 60
        num_read = sum(int(mask.sum()) for name, mask in batch.present.items() if name != "text")
        mine = [self.stop.received is not None, overdue and self.world.rank == 0, self.writer.written]
        stop, save, written, problems, read = self.world.sum(
            torch.tensor([*mine, len(batch.events), num_read], dtype=torch.float64, device=self.world.device)
        ).tolist()
        return stop > 0, save > 0, written == self.world.size, problems, read

    def _save(self, wait: bool) -> None:
        """Begin a checkpoint, after the log, so that a kill loses no line of a saved step; wait for it or go on."""
        with self.clock.stage("checkpoint"):
            self.writer.begin(self.session.progress)
        self.last_save = time.monotonic()
        if wait:
            self._commit()

    def _commit(self) -> None:
        with self.clock.stage("checkpoint"):
            self.writer.finish()

    def _bear_skipped(self, log: RunLog, batch: Batch, metrics: dict[str, float]) -> None:
        """Record a step that changed nothing; too many in a row end the run, on every rank alike."""
        step, in_a_row = self.session.progress.step, self.session.progress.num_skipped
        log.skipped(step, batch, metrics)
        if in_a_row > self.config.faults.max_skipped_steps:
            raise UserError(
                f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: not finite for "
                f"{in_a_row} steps in a row, faults.max_skipped_steps allows {self.config.faults.max_skipped_steps}; "
                f"look at one with 'parallelotope replay {self.run_dir} --step {step}', or lower optimizer.lr"
            )

    def _bear_unreadable(self, num_problems: float, num_read: float) -> None:
        """End a run that can read nothing but captions, on every rank alike, before its checkpoints are all of that."""
        step, allowed = self.session.progress.step, self.config.faults.max_unreadable_steps
        self.num_unreadable = self.num_unreadable + 1 if num_problems and not num_read else 0
        if self.num_unreadable > allowed:
            raise UserError(
                f"step {step}: {num_problems:.0f} data problems in a global batch of {self.config.train.global_batch}, "
                f"no picture and no sound read, as in the {allowed} steps before; faults.max_unreadable_steps allows "
                f"{allowed}: see {self.run_dir / 'data_problems'}; is the dataset still there?"
            )

    def _validate(self, log: RunLog) -> bool:
        """Score the validation split; returns whether it is the best so far, which is to be saved."""
        session = self.session
        assert session.validation is not None
        step = session.progress.step
        with self.clock.stage("validation"):
            report, found, kept = validation_score(session.engine, session.validation, self.config, self.world, step)
        log.validation(step, report, found)
        score = found.recall_at_1
        if self.world.rank == 0:
            with self.clock.stage("report"), log.attempt(f"step {step}: embeddings were not kept"):
                kept.save(embeddings_path(self.run_dir, "validation"))
        improved = session.progress.best_score is None or score > session.progress.best_score
        if improved:
            session.progress = replace(session.progress, best_score=score, best_step=step)
        return improved

    def _report(self, log: RunLog, state: str) -> None:
        """report.html of the run so far, by rank 0; while training so rarely that it takes 5 % of the time at most."""
        started = time.monotonic()
        if self.world.rank != 0 or (state == "training" and started < self.next_report):
            return
        with self.clock.stage("report"), log.attempt(f"step {self.session.progress.step}: no report"):
            from pretrain.report.page import PAGE, write_report

            write_report([self.run_dir], self.run_dir / PAGE, state=state)
        now = time.monotonic()
        self.next_report = now + REPORT_SPACING * (now - started)

    def _log(self, log: RunLog, batch: Batch, metrics: dict[str, float]) -> None:
        step, times = self.session.progress.step, self.clock.take()
        in_step = sum(seconds for name, seconds in times.items() if name.split("/")[1] not in BETWEEN_STEPS)
        speed = self.config.train.global_batch / in_step
        position = self.session.progress.position
        log.step(step, {**metrics, "position": position, "samples_per_s": speed, **times})
        if self.config.train.log_samples:
            log.samples(step, batch, self.session.dataset.numbers_in_log(batch.ids.tolist()))
        log.data_problems(step, batch)

    def _who(self) -> str:
        return f"rank {self.world.rank}, step {self.session.progress.step + 1}"

    def _write_facts(self) -> None:
        """What the run is, for people and for the report."""
        if self.world.rank == 0:
            self.session.notes += changed_settings(self.run_dir, self.config)
            write_run_config(self.run_dir, self.config)
            write_json(self.run_dir / "deepspeed.json", self.session.engine.deepspeed_config)
            self.session.facts.write(self.run_dir)

    def _greet(self, log: RunLog) -> None:
        """Derived numbers, named once."""
        config, world, session = self.config, self.world, self.session
        local_batch = config.train.global_batch // world.size
        for note in [*session.notes, *batch_notes(len(session.dataset), config.train.global_batch)]:
            log.say(note)
        if session.progress.step >= config.schedule.num_steps:
            log.say(f"finished at step {session.progress.step}: nothing left to do")
            return
        log.say(
            f"{world.size} ranks x {local_batch} samples = global batch {config.train.global_batch}, "
            f"{math.ceil(local_batch / config.train.chunk)} gradient-cache chunks a step, "
            f"ZeRO stage {config.train.zero_stage}, {config.train.precision}, "
            f"{session.facts.num_trained_parameters:,} trained parameters, "
            f"{len(session.dataset):,} training samples; "
            f"steps {session.progress.step + 1} to {config.schedule.num_steps}"
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
