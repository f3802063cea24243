"""What a run folder tells about a run: its curves, where its time went, what was measured on which split."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.settings import UserError, load_settings
from pretrain.config import RunConfig
from pretrain.kept_embeddings import embeddings_path
from pretrain.run_facts import RunFacts
from pretrain.run_log import METRICS, STAGES, VALIDATION, read_lines

NO_TERMS = (  # metrics that are no term of the loss
    "position", "data_problems", "skipped", "samples_per_s", "lr", "grad_norm", "loss", "time_s/", "temperature/",
    "num_samples/", "positive_cosine/", "epoch",
)  # fmt: skip
MAX_POINTS = 600  # of a curve
MAX_BARS = 60  # of the time split
TAIL_BYTES = 1 << 16  # more than one line of metrics.jsonl


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric over steps."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True, kw_only=True)
class EvaluatedSet:
    """A set of samples that retrieval was measured on. result: a RetrievalReport as JSON."""

    name: str  # "validation", or the split that was evaluated
    step: int | None
    result: dict[str, Any]
    embeddings: Path  # where they are, if they were kept


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """A run, as its folder tells it.

    state: training, finished or stopped. num_skipped: steps whose loss or gradient was not finite. stride: steps that
    each point of `curves` is the mean of. stage_s: seconds in each stage over all steps; bar_s: mean seconds a step in
    each stage, for the steps up to each of `bar_steps`.
    """

    folder: Path
    name: str
    config: RunConfig
    facts: RunFacts | None
    state: str
    step: int
    stride: int
    curves: dict[str, Curve]
    last: dict[str, float]
    num_skipped: int
    stage_s: dict[str, float]
    bar_steps: list[int]
    bar_s: dict[str, list[float]]
    validations: list[dict[str, Any]]
    sets: list[EvaluatedSet]

    def curves_of(self, prefix: str) -> dict[str, Curve]:
        """The curves whose names begin so, by the rest of the name."""
        return {name.removeprefix(prefix): curve for name, curve in self.curves.items() if name.startswith(prefix)}

    @property
    def terms(self) -> dict[str, Curve]:
        """The curves of the terms of the loss."""
        return {name: curve for name, curve in self.curves.items() if not name.startswith(NO_TERMS)}


@dataclass(kw_only=True)
class _Bucket:
    """Sums over consecutive steps."""

    last_step: int = 0
    num_steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, record: dict[str, Any]) -> None:
        self.last_step, self.num_steps = record["step"], self.num_steps + 1
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1


def read_run(folder: Path, state: str | None = None) -> RunHistory:
    """Read a run folder; `state` None: find it out.

    Memory does not grow with the number of steps: each point is the mean of as many steps as keeps `MAX_POINTS`.

    Raises:
        UserError: it is no run folder.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"run {folder}: no config.yaml in it; expected a run_dir of 'parallelotope pretrain'")
    config = load_settings(RunConfig, folder / "config.yaml")
    last = _last_record(folder / METRICS)
    step = int(last.get("step", 0))
    stride = max(1, math.ceil(step / MAX_POINTS))
    buckets: dict[int, _Bucket] = {}
    for record in _records(folder / METRICS):
        if record["step"] <= step:  # a run that goes on meanwhile adds lines
            buckets.setdefault((record["step"] - 1) // stride, _Bucket()).add(record)
    ordered = [buckets[number] for number in sorted(buckets)]
    bar_steps, bar_s = _bars(ordered)
    validations = read_lines(folder / VALIDATION)
    if state is None:
        state = "finished" if step >= config.schedule.num_steps else "training" if _in_use(folder) else "stopped"
    return RunHistory(
        folder=folder,
        name="/".join(folder.resolve().parts[-2:]),
        config=config,
        facts=RunFacts.read(folder),
        state=state,
        step=step,
        stride=stride,
        curves=_curves(ordered),
        last={name: value for name, value in last.items() if name != "step"},
        num_skipped=round(sum(bucket.sums.get("skipped", 0.0) for bucket in ordered)),
        stage_s=_stage_totals(ordered),
        bar_steps=bar_steps,
        bar_s=bar_s,
        validations=validations,
        sets=_sets(folder, config, validations),
    )


def _curves(buckets: list[_Bucket]) -> dict[str, Curve]:
    names = dict.fromkeys(name for bucket in buckets for name in bucket.sums)
    curves = {}
    for name in names:
        having = [bucket for bucket in buckets if name in bucket.sums]
        values = [bucket.sums[name] / bucket.counts[name] for bucket in having]
        curves[name] = Curve(steps=[bucket.last_step for bucket in having], values=values)
    return curves


def _stages(buckets: list[_Bucket]) -> list[str]:
    """Stages that took time, in the order of a step; those of another version last."""
    found = {name.removeprefix("time_s/") for bucket in buckets for name in bucket.sums if name.startswith("time_s/")}
    return [*(name for name in STAGES if name in found), *sorted(found - set(STAGES))]


def _stage_totals(buckets: list[_Bucket]) -> dict[str, float]:
    return {name: sum(b.sums.get(f"time_s/{name}", 0.0) for b in buckets) for name in _stages(buckets)}


def _bars(buckets: list[_Bucket]) -> tuple[list[int], dict[str, list[float]]]:
    size = max(1, math.ceil(len(buckets) / MAX_BARS))
    groups = [buckets[start : start + size] for start in range(0, len(buckets), size)]
    means: dict[str, list[float]] = {}
    for name in _stages(buckets):
        means[name] = [
            sum(b.sums.get(f"time_s/{name}", 0.0) for b in group) / sum(b.num_steps for b in group) for group in groups
        ]
    return [group[-1].last_step for group in groups], means


def _sets(folder: Path, config: RunConfig, validations: list[dict[str, Any]]) -> list[EvaluatedSet]:
    """The newest validation, then each evaluated split by name.

    Without the validation where its split was evaluated at that step or later: it would say the same twice.
    """
    sets = _evaluations(folder)
    if validations:
        newest = validations[-1]
        path = embeddings_path(folder, "validation")
        if not any(_is_of_validation(one, config) and (one.step or 0) >= newest["step"] for one in sets):
            sets.insert(0, EvaluatedSet(name="validation", step=newest["step"], result=newest, embeddings=path))
    return sets


def _is_of_validation(evaluated: EvaluatedSet, config: RunConfig) -> bool:
    own, data = config.data.validation, evaluated.result.get("data", "")
    return own is not None and evaluated.name == own.split and Path(data).resolve() == Path(own.path).resolve()


def _evaluations(folder: Path) -> list[EvaluatedSet]:
    sets = []
    for path in sorted(folder.glob("evaluation-*.json"), key=lambda path: path.stem):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            name, metrics = result["split"], result["metrics"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"evaluation {path}: not written by 'parallelotope evaluate' ({error})") from error
        assert isinstance(metrics, list)
        step = result.get("step")
        sets.append(EvaluatedSet(name=name, step=step, result=result, embeddings=embeddings_path(folder, path.stem)))
    return sets


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSONL file, one after the other; one that a kill cut off is left out."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                yield json.loads(line)


def _last_record(path: Path) -> dict[str, Any]:
    """The last whole line; {} without one."""
    if not path.is_file():
        return {}
    with open(path, "rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = stream.read().split(b"\n")
    record = json.loads(lines[-2]) if len(lines) > 1 else {}
    assert isinstance(record, dict)
    return record


def _in_use(folder: Path) -> bool:
    """Whether a process of this machine (or of those that share its locks) holds the run."""
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
