"""One recorded step of a run, made again in this process, with what every stage of it shows.

Order, augmentation and dropout are functions of the seed and the step, so a checkpoint from before the step is all it
takes; nothing is written into the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.settings import UserError
from pretrain.checkpoint import newest_whole
from pretrain.collectives import World
from pretrain.config import RunConfig
from pretrain.data.batch import Batch
from pretrain.run_log import METRICS, read_lines
from pretrain.session import Session

TOP = 5  # of what is listed by size


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One line of the replay: `what` of a `stage` is `value`."""

    stage: str
    what: str
    value: str


def replay_step(run: Path, config: RunConfig, world: World, step: int, say: Callable[[str], None]) -> list[Fact]:
    """Go on from the newest checkpoint before `step`, make the steps up to it, and tell what `step` did.

    Raises:
        UserError: `step` is not one of the run.
    """
    source, damaged = newest_whole(run, before_step=step)
    for line in damaged:
        say(f"{line}: passed over")
    if source is None:
        say(f"no checkpoint from before step {step}: from the beginning of the run")
    session = Session(config, world, source)
    for note in session.notes:
        say(note)
    first = session.progress.step + 1
    if step < first or step > config.schedule.num_steps:
        raise UserError(f"--step {step}: expected one of 1 to {config.schedule.num_steps}")
    with closing(session.loader()) as loader:
        session.engine.train(True)
        for number, batch in enumerate(islice(loader, step - first + 1), first):
            if number == step:
                return [*_recorded(run, step), *_observed(session, batch)]
            metrics, applied = session.step(batch)
            say(f"step {number}: loss {metrics['loss']:.6f}{'' if applied else ' (skipped)'}")
    raise AssertionError("a training loader has no end")


def _recorded(run: Path, step: int) -> Iterator[Fact]:
    for record in read_lines(run / METRICS):
        if record["step"] == step:
            for name in ("loss", "grad_norm", "skipped"):
                yield Fact(stage="recorded", what=name, value=f"{record.get(name, math.nan):.9g}")
            return
    yield Fact(stage="recorded", what="metrics.jsonl", value="no line of this step: the run has not logged it")


def _observed(session: Session, batch: Batch) -> Iterator[Fact]:
    """Make the step, and tell what each stage shows."""
    engine = session.engine
    yield from _of_data(batch)
    seen: dict[str, dict[str, Tensor]] = {}
    session.cache.observe = seen.__setitem__
    metrics = session.backward(batch)
    for what, stage in (("embeddings", "pass 1"), ("cached gradients", "objective")):
        for modality, rows in seen[what].items():
            yield from _of_rows(f"{modality} {what}", stage, rows, batch, modality.partition("@")[0])
    for name, value in metrics.items():
        yield Fact(stage="objective", what=name, value=f"{value:.9g}")
    gradients = {name: engine.full_gradient(p) for name, p in engine.trainable()}
    yield from _of_parameters("pass 2", "gradient", gradients)
    before = {name: engine.full_weight(p).clone() for name, p in engine.trainable()}
    done, applied = session.update(batch)
    for name, value in done.items():
        yield Fact(stage="step", what=name, value=f"{value:.9g}")
    yield Fact(stage="step", what="weights changed", value="yes" if applied else "no: skipped")
    clip = session.config.train.grad_clip
    if applied and clip:
        yield Fact(stage="step", what="clipped by", value=f"{min(1.0, clip / max(done['grad_norm'], 1e-30)):.4g}")
    after = {name: engine.full_weight(p) for name, p in engine.trainable()}
    yield from _of_parameters("step", "weight", after)
    yield from _of_parameters("step", "change", {name: after[name] - before[name] for name in after})


def _of_data(batch: Batch) -> Iterator[Fact]:
    yield Fact(stage="data", what="samples", value=f"{batch.num_samples}: {', '.join(batch.keys)}")
    yield Fact(stage="data", what="position", value=str(batch.position))
    yield Fact(stage="data", what="epochs", value=", ".join(map(str, sorted(set(batch.epochs.tolist())))))
    for event in batch.events:
        yield Fact(stage="data", what=f"unreadable {event.modality} of {event.key}", value=event.reason)
    for modality, inputs in batch.inputs.items():
        present = batch.present[modality]
        yield Fact(stage="data", what=f"{modality} present", value=f"{int(present.sum())} of {batch.num_samples}")
        for name, tensor in inputs.items():
            values = tensor[present].double()
            if values.numel():
                spread = f"mean {values.mean():.4g}, std {values.std(correction=0):.4g}"
                extent = f"min {values.min():.4g}, max {values.max():.4g}"
                yield Fact(stage="data", what=f"{modality} {name}", value=f"{spread}, {extent}")


def _of_rows(what: str, stage: str, rows: Tensor, batch: Batch, modality: str) -> Iterator[Fact]:
    """Of rows [n, D]: norms, and the samples that stand out."""
    present = batch.present[modality].to(rows.device)
    bad = ~rows.isfinite().all(dim=1) & present
    if bad.any():
        keys = [batch.keys[i] for i in bad.nonzero().flatten().tolist()]
        yield Fact(stage=stage, what=f"{what}, not finite", value=f"{len(keys)} rows: {', '.join(keys)}")
    good = rows[present & ~bad].double()
    if len(good) == 0:
        yield Fact(stage=stage, what=what, value="none")
        return
    norms = good.norm(dim=1)
    keys = [batch.keys[i] for i in (present & ~bad).nonzero().flatten().tolist()]
    mean = good / norms.clamp_min(1e-30)[:, None]
    value = f"norm {norms.mean():.4g} on average, at most {norms.max():.4g} ({keys[int(norms.argmax())]})"
    yield Fact(stage=stage, what=what, value=f"{value}; mean direction {mean.mean(dim=0).norm():.3f} (1: all alike)")


def _of_parameters(stage: str, what: str, values: Mapping[str, Tensor]) -> Iterator[Fact]:
    """Norms by part of the model, the largest single ones, and those that are not finite."""
    parts: dict[str, list[Tensor]] = {}
    for name, value in values.items():
        parts.setdefault(_part(name), []).append(value.double().flatten())
    for part, tensors in parts.items():
        yield Fact(stage=stage, what=f"{what} of {part}", value=f"norm {torch.cat(tensors).norm():.6g}")
    bad = [name for name, value in values.items() if not value.isfinite().all()]
    if bad:
        yield Fact(stage=stage, what=f"{what}, not finite", value=f"{len(bad)} parameters: {', '.join(bad[:TOP])}")
    norms: dict[str, Any] = {name: value.double().norm().item() for name, value in values.items() if name not in bad}
    largest = sorted(norms, key=lambda name: -norms[name])[:TOP]
    listed = ", ".join(f"{name} {norms[name]:.3g}" for name in largest)
    yield Fact(stage=stage, what=f"largest {what}", value=listed or "none")


def _part(name: str) -> str:
    """towers.towers.video.encoder.x -> towers.video"""
    parts = name.split(".")
    return f"towers.{parts[2]}" if parts[0] == "towers" else parts[0]
