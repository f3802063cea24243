"""The commands `parallelotope checkpoint list|inspect|prune`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from data_pipeline.settings import UserError, nearest
from pretrain.checkpoint import (
    checkpoints_folder,
    damage,
    finished_checkpoints,
    prune,
    read_description,
    read_progress,
    step_of,
    to_prune,
)

RunPath = Annotated[Path, typer.Argument(help="A run folder.")]


def list_checkpoints(
    run: RunPath,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare checksums.")] = False,
) -> None:
    """The checkpoints of a run, oldest first. With --verify the exit code is 1 when one is damaged."""
    paths = _checkpoints(run)
    table = Table("step", "samples drawn", "skipped in a row", "ranks", "size", "saved", "", "state")
    best = _best_step(paths)
    num_damaged = 0
    for path in paths:
        try:
            description = read_description(path)
            problem = damage(path) if verify else None
        except UserError as error:
            description, problem = None, str(error)
        num_damaged += problem is not None
        progress = description["progress"] if description else {}
        marks = [word for word, holds in (("best", step_of(path) == best), ("last", path == paths[-1])) if holds]
        told = (
            progress.get("position", "?"),
            progress.get("num_skipped", "?"),
            (description or {}).get("num_ranks", "?"),
        )
        state = problem or ("whole" if verify else "not verified")
        table.add_row(str(step_of(path)), *map(str, told), _size(_num_bytes(path)), _when(path), " ".join(marks), state)
    Console().print(table)
    raise typer.Exit(1 if num_damaged else 0)


def inspect_checkpoint(
    run: Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints.")],
    step: Annotated[int | None, typer.Option(help="Which one of the run; default: the last.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
) -> None:
    """What a checkpoint holds: progress, identity, and its tensors with their norms."""
    from pretrain.stored_tensors import StoredTensors

    path = run if (run / "checkpoint.json").is_file() else _chosen(run, step)
    description = read_description(path)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{path}: {damage(path) or 'whole'}", markup=False)
    for part in ("progress", "identity"):
        for name, value in description[part].items():
            console.print(f"{part}.{name}: {value}", markup=False)
    console.print(f"config_sha256: {description['config_sha256']}  saved by {description['num_ranks']} ranks")
    stored = StoredTensors(path)
    table = Table("tensor" if tensors else "tensors", "shape" if tensors else "number", "values", "norm", "not finite")
    groups: dict[str, list[str]] = {}
    for name in stored:
        groups.setdefault(name if tensors else _part(name), []).append(name)
    for group in sorted(groups):
        values = [stored[name].double() for name in groups[group]]
        norm = sum(v.square().sum().item() for v in values) ** 0.5
        shape = str(list(values[0].shape)) if tensors else str(len(values))
        bad = sum(int((~v.isfinite()).sum()) for v in values)
        table.add_row(group, shape, f"{sum(v.numel() for v in values):,}", f"{norm:.6g}", str(bad))
    console.print(table)


def prune_checkpoints(
    run: RunPath,
    keep_last: Annotated[int, typer.Option(min=1, help="How many of the newest stay.")] = 2,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Those whose step this divides stay too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False,
) -> None:
    """Delete checkpoints; the best one stays. Refused while the run is under way."""
    from pretrain.run_lock import hold_run

    _checkpoints(run)
    lock = hold_run(run)
    try:
        paths = _checkpoints(run)
        best = _best_step(paths)
        for path in reversed(paths[-keep_last:]):
            problem = damage(path)
            if problem is not None:
                raise UserError(f"checkpoint {path} is damaged ({problem}): move it away first, others would go for it")
        doomed = to_prune(run, keep_last, best, keep_every)
        size = _size(sum(_num_bytes(path) for path in doomed))
        if not dry_run:
            prune(run, keep_last, best, keep_every)
    finally:
        os.close(lock)
    names = ", ".join(path.name for path in doomed) or "nothing"
    typer.echo(f"{'would delete' if dry_run else 'deleted'} {names} ({size})")


def _checkpoints(run: Path) -> list[Path]:
    paths = finished_checkpoints(run)
    if not paths:
        raise UserError(f"run {run}: no checkpoint found; expected {checkpoints_folder(run)}/step-*")
    return paths


def _best_step(paths: list[Path]) -> int | None:
    """The best step that the newest checkpoint knows which can say it."""
    for path in reversed(paths):
        try:
            return read_progress(path).best_step
        except UserError:
            continue
    return None


def _chosen(run: Path, step: int | None) -> Path:
    paths = _checkpoints(run)
    if step is None:
        return paths[-1]
    by_step = {str(step_of(path)): path for path in paths}
    if str(step) not in by_step:
        raise UserError(f"run {run}: no checkpoint of step {step}; {nearest(str(step), by_step)}")
    return by_step[str(step)]


def _part(name: str) -> str:
    """weight/towers.towers.video.encoder.x -> weight/towers.video"""
    kind, path = name.split("/", 1)
    parts = path.split(".")
    return f"{kind}/{parts[0]}.{parts[2]}" if parts[0] in ("towers", "average") else f"{kind}/{parts[0]}"


def _files(path: Path) -> Iterable[Path]:
    return (file for file in path.iterdir() if file.is_file())


def _num_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


def _when(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((path / "checkpoint.json").stat().st_mtime))
