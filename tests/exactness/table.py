"""Cells in, measures out: references first, then one start of ranks for all cells of a number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.exactness.cells import Cell
from tests.exactness.measurement import worst_over_ranks
from tests.exactness.problem import write_datasets
from tests.ranks import run_ranks

TIMEOUT_S = 1800.0
FAULT_SEEN = 1e-2  # relative difference of the gradient


@dataclass(frozen=True, kw_only=True)
class Row:
    """A cell and its measures: loss, gradient, worst_tensor, weights, movement (relative), reductions, worst_name."""

    cell: Cell
    measures: dict[str, Any]

    @property
    def missed(self) -> list[str]:
        """The columns that are over their limit; of a fault: those that do not show it."""
        if self.cell.fault:
            return [] if self.measures["gradient"] > FAULT_SEEN else ["gradient"]
        missed = [column for column, limit in self.cell.limits.items() if not self.measures[column] <= limit]
        return missed if 1 <= self.measures["reductions"] < 1.1 else [*missed, "reductions"]  # slices are padded


def measure_table(cells: Sequence[Cell], folder: Path, show: bool = False) -> list[Row]:
    """The rows of `cells`, in their order. folder: for data sets, references and logs; empty. show: progress."""
    write_datasets(folder)
    run_ranks(
        "tests.exactness.reference:write_references", 1, folder / "references",
        [str(folder), [asdict(cell) for cell in cells]], TIMEOUT_S, show,
    )  # fmt: skip
    measures: dict[Cell, dict[str, Any]] = {}
    for ranks in sorted({cell.ranks for cell in cells}):
        own = [cell for cell in cells if cell.ranks == ranks]
        argument = [str(folder), [asdict(cell) for cell in own]]
        found = run_ranks(
            "tests.exactness.measurement:measure_cells", ranks, folder / f"ranks-{ranks}", argument, TIMEOUT_S, show
        )
        measures |= {
            cell: worst_over_ranks(by_rank) for cell, by_rank in zip(own, zip(*found, strict=True), strict=True)
        }
    return [Row(cell=cell, measures=measures[cell]) for cell in cells]
