"""The cells of a comparison: objective x setting x seed. The result of each is one file, which is there whole or not.

Running again makes what is missing. Several processes may work on one folder: each cell is locked while it is made.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.settings import UserError
from data_pipeline.shards import shards_digest, shards_of, write_json
from pretrain.compare.config import CompareConfig, CorpusConfig, Entry, EventsConfig, MixtureConfig
from pretrain.config import RunConfig
from pretrain.identity import differences
from pretrain.objective_config import Options

CELLS = "cells"
DATASETS = "datasets"  # their digests, in an experiment's facts


@dataclass(frozen=True, kw_only=True)
class Cell:
    """entry: its anchors are names of `modalities`. facts: all that its result depends on, as JSON."""

    setting: str
    modalities: tuple[str, ...]
    label: str
    entry: Entry
    seed: int
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its file and folder."""
        return f"{self.setting}.{self.label}.seed-{self.seed}"

    @property
    def anchor(self) -> str | None:
        """Of the first objective that has one."""
        return next((a for part in self.entry.objective if (a := getattr(part, "anchor", None)) is not None), None)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a cell came to. note: why there are no metrics, else empty."""

    metrics: dict[str, float]
    note: str = ""


def list_cells(config: CompareConfig, run: RunConfig | None = None, *, page_only: bool = False) -> list[Cell]:
    """All cells, those of one seed together, so that a comparison that is not finished has whole pairs.

    run: the training config of a comparison on a corpus. page_only: the corpus may be gone.

    Raises:
        UserError: two cells of one name; a corpus that is not there.
    """
    experiment = _experiment(config, run)
    if run is not None:
        try:
            experiment[DATASETS] = _dataset_digests(config, run)
        except UserError:
            if not page_only:
                raise
    cells = [
        _cell(experiment, setting, names, label, entry, seed)
        for seed in config.seeds
        for setting, names in _settings(config, run)
        for label, entry in _entries(config, names)
    ]
    names = [cell.name for cell in cells]
    twice = next((cell for cell in cells if names.count(cell.name) > 1), None)
    if twice is not None:
        raise UserError(f"objectives: '{twice.label}' is there twice (each_anchor makes a label of each modality)")
    return cells


def _settings(config: CompareConfig, run: RunConfig | None) -> list[tuple[str, tuple[str, ...]]]:
    if isinstance(config.experiment, CorpusConfig):
        assert run is not None
        return [(config.experiment.split, run.towers.names)]
    generator = config.experiment.generator
    if isinstance(generator, EventsConfig):
        return [("events", ("video", "audio", "text"))]
    return [(f"M={m}", tuple(f"x{i + 1}" for i in range(m))) for m in generator.num_modalities]


def _entries(config: CompareConfig, names: tuple[str, ...]) -> Iterator[tuple[str, Entry]]:
    mixture = config.experiment.name == "synthetic" and isinstance(config.experiment.generator, MixtureConfig)
    known = {"worst": names[0], "best": names[-1]} if mixture else {}
    for entry in config.objectives:
        if entry.num_modalities is not None and len(names) not in entry.num_modalities:
            continue
        for anchor in names if entry.each_anchor else (None,):
            parts = [_with_names(part, known, anchor) for part in entry.objective]
            label = entry.label if anchor is None else f"{entry.label} {anchor}"
            yield label, entry.model_copy(update={"objective": parts})


def _with_names(part: Options, known: dict[str, str], anchor: str | None) -> Options:
    """`worst` and `best` as names of modalities; every anchor as `anchor` where that is given."""
    changes: dict[str, Any] = {}
    own = getattr(part, "anchor", None) or ""
    if "anchor" in type(part).model_fields and (anchor is not None or own in known):
        changes["anchor"] = anchor or known[own]
    pairs = getattr(part, "pairs", "all")
    if pairs != "all":
        changes["pairs"] = [tuple("+".join(known.get(n, n) for n in s.split("+")) for s in pair) for pair in pairs]
    return part.model_copy(update=changes)


def _experiment(config: CompareConfig, run: RunConfig | None) -> dict[str, Any]:
    """What the result of a cell depends on beside its own settings."""
    experiment = config.experiment.model_dump(mode="json")
    if "generator" in experiment:
        experiment["generator"].pop("num_modalities", None)
    if run is not None:  # all of it, whatever mixture of file and overrides says so
        experiment |= {"run": run.model_dump(mode="json", exclude={"run_dir", "seed", "objective"}), "overrides": []}
    return experiment


def _dataset_digests(config: CompareConfig, run: RunConfig) -> dict[str, Any]:
    assert isinstance(config.experiment, CorpusConfig)
    evaluated = config.experiment.data or run.data.train[0].path
    return {
        "train": [shards_digest(shards_of(part.path, part.split)) for part in run.data.train],
        "evaluated": shards_digest(shards_of(evaluated, config.experiment.split)),
    }


def _cell(
    experiment: dict[str, Any], setting: str, names: tuple[str, ...], label: str, entry: Entry, seed: int
) -> Cell:
    facts = {
        "label": label, "setting": setting, "seed": seed, "modalities": list(names), "experiment": experiment,
        "objective": [part.model_dump(mode="json", exclude={"tile"}) for part in entry.objective],
        "freeze_anchor": entry.freeze_anchor, "lr": entry.lr,
    }  # fmt: skip
    return Cell(setting=setting, modalities=names, label=label, entry=entry, seed=seed, facts=facts)


def result_path(out_dir: Path, cell: Cell) -> Path:
    """Where a cell's result lies."""
    return out_dir / CELLS / f"{cell.name}.json"


def read_result(out_dir: Path, cell: Cell) -> dict[str, Any] | None:
    """What a cell's file holds, None where there is none: "metrics", "note", "seconds", "cell".

    Of a cell that knows no digests of its datasets (a page of a corpus that is gone), any will do.

    Raises:
        UserError: it was made with other settings, or is no result.
    """
    path = result_path(out_dir, cell)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        metrics, made_with = found["metrics"], found["cell"]
        if DATASETS not in cell.facts["experiment"]:
            made_with["experiment"].pop(DATASETS, None)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cell {path}: no result of a comparison ({error}); delete it to have it made again") from error
    other = differences("", made_with, cell.facts)
    if other:
        raise UserError(
            f"cell {path} was made with other settings: {'; '.join(other)}; use another out_dir, or delete it "
            "(and its run folder, where it has one)"
        )
    assert isinstance(metrics, dict)
    return dict(found)


def run_missing(out_dir: Path, cells: Sequence[Cell], make: Callable[[Cell], Outcome]) -> list[str]:
    """Make every cell that has no result and that no other process is making.

    Returns a line for each cell that failed; it has no result, so that running again tries it again.
    """
    (out_dir / CELLS).mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if read_result(out_dir, cell) is None]
    failures: list[str] = []
    console = Console(soft_wrap=True, highlight=False, markup=False)
    columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(missing))
        for number, cell in enumerate(missing, start=1):
            with _held(out_dir, cell) as mine:
                said = _make(out_dir, cell, make, failures) if mine else "another process is making it"
            console.print(f"{number}/{len(missing)} {cell.setting} {cell.label}, seed {cell.seed}: {said}")
            bar.advance(task)
    return failures


def _make(out_dir: Path, cell: Cell, make: Callable[[Cell], Outcome], failures: list[str]) -> str:
    """Make a cell and write its result; what to say of it."""
    if read_result(out_dir, cell) is not None:
        return "another process made it"
    started = time.monotonic()
    try:
        outcome = make(cell)
    except UserError as error:
        failures.append(f"cell {cell.name}: {error}")
        return f"failed: {error}"
    seconds = round(time.monotonic() - started, 2)
    value = {"cell": cell.facts, "metrics": outcome.metrics, "note": outcome.note, "seconds": seconds}
    write_json(result_path(out_dir, cell), value)
    return f"{seconds:.1f} s{', ' + outcome.note if outcome.note else ''}"


@contextmanager
def _held(out_dir: Path, cell: Cell) -> Iterator[bool]:
    """Whether this process now holds the cell; the kernel lets go when it ends, however it ends."""
    descriptor = os.open(out_dir / CELLS / f".{cell.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
