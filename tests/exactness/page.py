"""The measures as a Markdown page."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import groupby

from tests.exactness.cells import ADAMW, BF16, DROPOUT, FAULTS, GLOBAL_BATCH, OFFLOAD, OPTIONS, TOLERANCE, TOPOLOGY
from tests.exactness.problem import LEARNING_RATE, NUM_STEPS
from tests.exactness.table import FAULT_SEEN, Row

COLUMNS = {
    "loss": "loss",
    "gradient": "gradient",
    "worst_tensor": "worst tensor",
    "weights": f"weights after {NUM_STEPS}",
    "movement": "of their way",
}
INTRODUCTION = f"""\
# Exactness

Every row trains {NUM_STEPS} steps of three small towers on real shards (global batch {GLOBAL_BATCH}, augmentation on, learned temperature)
with the loader, the gradient cache, the gather and DeepSpeed that any run uses, and is compared with one process that has none of
them: autograd over the whole batch in one graph, the loss in float64 from its formula, torch's own optimizer.

    make exactness        # writes this page; exits with 1 if a row that must hold does not

{{machine}}

| column | what is compared | must be |
|---|---|---|
| loss | largest relative difference over the {NUM_STEPS} steps | <= {TOLERANCE:g} |
| gradient | of step 1: norm of the difference over the norm, all parameters | <= {TOLERANCE:g} |
| worst tensor | the same for the worst parameter, over its own norm (or 1e-3 of the whole gradient's, if that is more) | <= {TOLERANCE:g} |
| weights after {NUM_STEPS} | norm of the difference over the norm, all parameters | <= {TOLERANCE:g} with SGD |
| of their way | the same difference over the distance that the weights have gone since the start | |
| reductions | gradient elements that a rank hands to adding collectives a step, over the number of parameters; ZeRO pads its slices. One rank: reductions of the engine | 1 |

chunks: gradient-cache chunks of each rank. ragged: samples lack modalities at random, whole ranks lack one, one rank lacks
everything in the second batch. A figure over its limit is bold.
"""
READINGS = {
    TOPOLOGY: f"SGD, learning rate {LEARNING_RATE['sgd']:g}, fp32. What is left is the order of sums in fp32.",
    DROPOUT: "Ragged masks. Draws belong to the step, the tower and the micro-chunk of the global batch, not to a rank.",
    OFFLOAD: "Weights and moments of the optimizer live, and are updated, on the host.",
    OPTIONS: "Clipping of the gradient's norm to 0.1 (here the norm is larger), a modality that is nowhere, two objectives at once.",
    ADAMW: (
        f"Learning rate {LEARNING_RATE['adamw']:g}. The gradient is the same; the weights are not held to a limit. AdamW divides each "
        "gradient by its own size, so where a gradient is zero in exact arithmetic (the key biases of attention) it moves the weight by "
        "the sign of a rounding error. Such weights do not change what the towers compute. Compare runs by their losses, or with SGD."
    ),
    BF16: (
        "Encoders under bf16 autocast; weights, projections, temperatures, the objective and all sums of gradients stay fp32. Nothing here "
        "is held to a limit but the number of reductions. *against bf16*: one process in bf16 without chunks. bf16 keeps 8 bits, and "
        "matrix products of other shapes round otherwise, so other chunks differ by about as much as bf16 differs from fp32 at all: in "
        "bf16 a number of ranks is a different rounding, not a different loss."
    ),
    FAULTS: (
        f"What the table would show if something were wrong: a gradient that is off by more than {FAULT_SEEN:g} counts as seen. "
        "*gather without gradient*: as published trainers do. *factor of world size*: the mean over ranks is not undone. *other draws*: "
        "dropout under other keys."
    ),
}


def render(rows: Sequence[Row], seconds: float) -> str:
    """The page. rows of a group follow each other. seconds: what measuring took."""
    parts = [INTRODUCTION.replace("{machine}", _machine(rows, seconds))]
    for group, members in groupby(rows, key=lambda row: row.cell.group):
        parts.append(f"## {group}\n\n{READINGS[group]}\n\n{_table(list(members))}\n")
    return "\n".join(parts)


def _machine(rows: Sequence[Row], seconds: float) -> str:
    held = [row for row in rows if row.cell.limits and not row.cell.fault]
    missed = sum(bool(row.missed) for row in held)
    return (
        f"{datetime.now(timezone.utc):%Y-%m-%d}: {os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {version('torch').split('+')[0]}, DeepSpeed {version('deepspeed')}, gloo; {len(rows)} rows in {seconds / 60:.0f} minutes. "
        f"**{len(held) - missed} of {len(held)} rows that must hold do.**"
    )


def _table(rows: Sequence[Row]) -> str:
    varying = [name for name in SETTINGS if len({_setting(row, name) for row in rows}) > 1]
    heads = [*varying, *COLUMNS.values(), "reductions", ""]
    lines = [
        heads,
        ["---"] * len(heads),
        *([*(_setting(row, name) for name in varying), *_figures(row)] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


SETTINGS = ("ranks", "ZeRO", "chunks", "objective", "masks", "optimizer", "options", "against", "fault")


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
        "options": ", ".join(filter(None, (clip, "offload" if cell.offload else ""))),
        "against": cell.reference or cell.precision,
        "fault": cell.fault,
    }[name]


def _figures(row: Row) -> list[str]:
    figures = [
        f"**{row.measures[column]:.1e}**" if column in row.missed else f"{row.measures[column]:.1e}"
        for column in COLUMNS
    ]
    reductions = f"{row.measures['reductions']:.2f}"
    if row.cell.fault:
        mark = "not seen" if row.missed else "seen"
    elif not row.cell.limits:
        mark = "not met" if row.missed else ""
    else:
        mark = "not met" if row.missed else "met"
    return [*figures, f"**{reductions}**" if "reductions" in row.missed else reductions, mark]
