"""The measures as a Markdown page."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby

from tests.exactness import prose
from tests.exactness.cells import SMALL_CHUNK_TOLERANCE, TOLERANCE
from tests.exactness.table import Row

FIGURES = {
    "loss": "loss",
    "gradient": "gradient",
    "worst_tensor": "worst tensor",
    "weights": "weights",
    "movement": "of their way",
}
SETTINGS = ("ranks", "ZeRO", "chunks", "objective", "masks", "optimizer", "precision", "options", "against", "fault")


def render(rows: Sequence[Row], seconds: float) -> str:
    """The page. rows of a group follow each other. seconds: what measuring took."""
    parts = [prose.INTRODUCTION, _machine(rows, seconds), prose.COLUMNS]
    for group, members in groupby(rows, key=lambda row: row.cell.group):
        parts.append(f"## {group}\n\n{prose.READINGS[group]}\n\n{_table(list(members))}\n")
    return "\n".join(parts)


def _machine(rows: Sequence[Row], seconds: float) -> str:
    held = [row for row in rows if row.cell.limits and not row.cell.fault]
    missed = sum(bool(row.missed) for row in held)
    loose = sum(row.measures["worst_tensor"] > TOLERANCE for row in held if not row.missed)
    now = f"{datetime.now(UTC):%Y-%m-%d}"
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}"
    libraries = f"torch {version('torch').split('+')[0]}, DeepSpeed {version('deepspeed')}, gloo"
    return (
        f"{now}: {machine}, {libraries}; {len(rows)} rows in {seconds / 60:.0f} minutes.\n"
        f"**{len(held) - missed} of {len(held)} rows that must hold do.** "
        f"Of these, {loose} have a worst tensor between {TOLERANCE:g} and {SMALL_CHUNK_TOLERANCE:g}.\n"
    )


def _table(rows: Sequence[Row]) -> str:
    varying = [name for name in SETTINGS if len({_setting(row, name) for row in rows}) > 1]
    heads = [*varying, *FIGURES.values(), "reductions", ""]
    lines = [
        heads,
        ["---"] * len(heads),
        *([*(_setting(row, name) for name in varying), *_figures(row)] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _setting(row: Row, name: str) -> str:
    cell = row.cell
    clip = f"clip {cell.grad_clip:g}" if cell.grad_clip else ""
    return {
        "ranks": str(cell.ranks),
        "ZeRO": str(cell.stage),
        "chunks": str(cell.chunks),
        "objective": cell.objective,
        "masks": cell.masks,
        "optimizer": cell.optimizer,
        "precision": cell.precision,
        "options": ", ".join(filter(None, (clip, "offload" if cell.offload else ""))),
        "against": cell.reference or cell.precision,
        "fault": cell.fault,
    }[name]


def _figures(row: Row) -> list[str]:
    figures = [
        f"**{row.measures[column]:.1e}**" if column in row.missed else f"{row.measures[column]:.1e}"
        for column in FIGURES
    ]
    reductions = f"{row.measures['reductions']:.2f}"
    if row.cell.fault:
        mark = "not seen" if row.missed else "seen"
    elif not row.cell.limits:
        mark = "not met" if row.missed else ""
    else:
        mark = "not met" if row.missed else "met"
    return [*figures, f"**{reductions}**" if "reductions" in row.missed else reductions, mark]
