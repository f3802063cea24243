"""What a run writes while it goes: metrics.jsonl always, TensorBoard events, lines on the terminal. Rank 0 only.

A resumed run first drops every line later than its checkpoint, so the log is that of one uninterrupted run.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from data_pipeline.settings import UserError
from data_pipeline.shards import publish
from pretrain.data.batch import Batch
from pretrain.retrieval_report import RetrievalMetrics

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
STAGES = ("data", "pass_1", "gather", "objective", "pass_2", "step", "checkpoint", "validation", "report")
BETWEEN_STEPS = ("checkpoint", "validation", "report")  # logged with the step after them


class StageClock:
    """Seconds spent in each named stage since the last `take`; a stage inside another is not counted in the outer."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._inner_s = 0.0  # spent in stages inside the current one
        self._position = ("start", time.monotonic())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        outer, _ = self._position
        outer = "between stages" if outer == "start" else outer
        self._position = (name, time.monotonic())
        started, before = self._now(), self._inner_s
        self._inner_s = 0.0
        try:
            yield
        finally:
            whole_s = self._now() - started
            self._seconds[name] = self._seconds.get(name, 0.0) + whole_s - self._inner_s
            self._inner_s = before + whole_s
            self._position = (outer, time.monotonic())

    def position(self) -> tuple[str, float]:
        """The innermost stage that is under way, and for how many seconds none has begun or ended."""
        name, since = self._position
        return name, time.monotonic() - since

    def take(self) -> dict[str, float]:
        """{"time_s/data": ...} so far; starts again from zero."""
        taken = {f"time_s/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return taken

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class RunLog:
    """Writes metrics of a run; on ranks other than 0 it writes only what is per rank."""

    def __init__(self, run: Path, rank: int, resumed_step: int, num_steps: int, log_every: int) -> None:
        self._run, self._rank, self._num_steps, self._log_every = run, rank, num_steps, log_every
        self._board: Any = None
        if rank == 0:
            for path in (
                run / METRICS,
                run / VALIDATION,
                *run.glob("samples/*.jsonl"),
                *run.glob("data_problems/*.jsonl"),
                *run.glob("skipped_steps/*.jsonl"),
            ):
                keep_until(path, resumed_step)
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run), purge_step=resumed_step + 1)

    def step(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics. Numbers that are not finite are left out: JSON cannot say them."""
        if self._rank != 0:
            return
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        append_line(self._run / METRICS, {"step": step, **finite})
        for name, value in finite.items():
            self._board.add_scalar(name, value, step)
        if step % self._log_every == 0 or step in (1, self._num_steps):
            self.say(self._line(step, values))

    def _line(self, step: int, values: dict[str, float]) -> str:
        cosines = [
            f"{name.split('/')[1]} {v:+.2f}" for name, v in values.items() if name.startswith("positive_cosine/")
        ]
        times = {name.split("/")[1]: v for name, v in values.items() if name.startswith("time_s/")}
        shares = [f"{name} {100 * v / sum(times.values()):.0f}%" for name, v in times.items()]
        step_s = sum(seconds for name, seconds in times.items() if name not in BETWEEN_STEPS)
        left_s = (self._num_steps - step) * step_s
        num_problems = values.get("data_problems", 0.0)
        problems = f"  {num_problems:.0f} data problems" if num_problems else ""
        return (
            f"step {step}/{self._num_steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"grad {values['grad_norm']:.2f}  cos {', '.join(cosines)}  {values['samples_per_s']:.0f} samples/s  "
            f"({', '.join(shares)})  about {left_s:.0f} s left{problems}"
        )

    def validation(self, step: int, report: dict[str, Any], found: RetrievalMetrics) -> None:
        """A line in validation.jsonl; R@1 of `found`, the report's headline, on the terminal and in TensorBoard."""
        if self._rank != 0:
            return
        append_line(self._run / VALIDATION, {"step": step, "score": found.recall_at_1, **report})
        self._board.add_scalar("validation/score", found.recall_at_1, step)
        low, high = 100 * found.recall_at_1_low, 100 * found.recall_at_1_high
        self.say(
            f"step {step}: validation R@1 {100 * found.recall_at_1:.1f} % (95 %: {low:.1f} to {high:.1f}; "
            f"chance {100 * found.chance_recall_at_1:.2g} %; {found.num_queries} queries)"
        )

    def say(self, line: str) -> None:
        """A line on the terminal, from rank 0."""
        if self._rank == 0:
            print(line, file=sys.stderr, flush=True)

    @contextmanager
    def attempt(self, failure: str) -> Iterator[None]:
        """What is inside may fail, whatever the reason: that is a line on the terminal, and the run goes on.

        For what a run can do without and can have again later; nothing inside may talk to other ranks.
        """
        try:
            yield
        except Exception as error:  # a full disk, unreadable media, a missing library
            self.say(f"{failure}: {type(error).__name__}: {' '.join(str(error).split())}")

    def samples(self, step: int, batch: Batch, datasets: list[int] | None) -> None:
        """The keys of this rank's samples of a step, and the numbers of their `datasets` where there are several."""
        record = {"step": step, "position": batch.position, "epochs": batch.epochs.tolist(), "keys": batch.keys}
        record |= {} if datasets is None else {"datasets": datasets}
        append_line(self._run / "samples" / f"rank-{self._rank:05d}.jsonl", record)

    def skipped(self, step: int, batch: Batch, values: dict[str, float]) -> None:
        """A step that changed nothing, with the keys of this rank's samples."""
        what = {name: str(values[name]) for name in ("loss", "grad_norm")}
        record = {"step": step, "position": batch.position, **what, "keys": batch.keys}
        append_line(self._run / "skipped_steps" / f"rank-{self._rank:05d}.jsonl", record)
        self.say(
            f"step {step} skipped: loss {what['loss']}, gradient norm {what['grad_norm']}; its samples are in "
            f"{self._run / 'skipped_steps'}; look at it: parallelotope replay {self._run} --step {step}"
        )

    def data_problems(self, step: int, batch: Batch) -> None:
        """Members of this rank's samples that could not be read."""
        for event in batch.events:
            record = {"step": step, "key": event.key, "modality": event.modality, "reason": event.reason}
            record |= {"dataset": event.dataset} if event.dataset else {}
            append_line(self._run / "data_problems" / f"rank-{self._rank:05d}.jsonl", record)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line; a line is written whole by one call.

    Raises:
        UserError: it cannot be written. A resumed run drops what there is of it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; checkpoints are whole, the same command goes on from them"
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; a last line that a kill cut off is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def keep_until(path: Path, step: int) -> None:
    """Drop the records later than `step`, atomically."""
    if not path.is_file():
        return
    partial = path.with_name(f".{path.name}.partial")
    kept = [record for record in read_lines(path) if record["step"] <= step]
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    publish(partial, path)
