"""The first law: the short form of docs/exactness.md. Every kind of row of the table, at 1, 2 and 4 ranks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.exactness.cells import (
    ADAMW,
    BF16,
    CELLS,
    DROPOUT,
    EVERY,
    FAULTS,
    OFFLOAD,
    OPTIONS,
    PLAIN,
    TOPOLOGY,
    Cell,
    Fault,
)
from tests.exactness.page import render
from tests.exactness.table import Row, measure_table

SLOW = pytest.mark.slow


def sample(ranks: int) -> list[Cell]:
    """Cells of so many ranks in which every value that a setting takes in the table occurs.

    Of the objectives, at 2 ranks only those of the first table: tests/objectives/test_ranks.py has the others.
    """
    seen: set[tuple[str, Any]] = set()
    chosen = []
    for cell in CELLS:
        values = set(asdict(cell).items())
        left_out = (PLAIN, EVERY) if ranks == 2 else (PLAIN,)
        if cell.ranks == ranks and cell.group not in left_out and not values <= seen:
            seen |= values
            chosen.append(cell)
    return chosen


def test_five_steps_in_every_zero_stage(tmp_path: Path) -> None:
    """The first rows of the table, without the slow tests."""
    cells = [cell for cell in sample(2) if cell.group == TOPOLOGY]
    assert {cell.stage for cell in cells} == {0, 1, 2, 3}
    for row in measure_table(cells, tmp_path):
        assert not row.missed, (row.missed, row.cell, row.measures)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [pytest.param(ranks, marks=SLOW) for ranks in (1, 2, 4)])
def test_five_steps_are_those_of_one_process_without_cache(tmp_path: Path, ranks: int) -> None:
    for row in measure_table(sample(ranks), tmp_path):
        assert not row.missed, (row.missed, row.cell, row.measures)
        if not row.cell.fault:  # also bf16, whose rows have no limit
            assert row.measures["gradient"] < 0.05, (row.cell, row.measures)


def test_the_sample_has_every_kind_of_row() -> None:
    for ranks in (2, 4):
        cells = sample(ranks)
        groups = {TOPOLOGY, DROPOUT, OFFLOAD, OPTIONS, ADAMW, BF16, FAULTS}
        assert {cell.group for cell in cells} == (groups if ranks == 2 else {*groups, EVERY})
        assert {cell.stage for cell in cells} == {0, 1, 2, 3}
        assert {cell.fault for cell in cells} == {"", *get_args(Fault)}


@pytest.fixture
def measures() -> dict[str, Any]:
    columns = ("loss", "gradient", "worst_tensor", "weights", "movement")
    return dict.fromkeys(columns, 5e-7) | {"reductions": 1.0, "worst_name": "head"}


def test_a_row_misses_what_is_over_its_limit(measures: dict[str, Any]) -> None:
    cell = Cell(group=TOPOLOGY, ranks=2, chunks=1)
    assert Row(cell=cell, measures=measures).missed == []
    for column in ("loss", "gradient", "worst_tensor", "weights"):
        for value in (1.1e-6, float("nan")):
            assert Row(cell=cell, measures=measures | {column: value}).missed == [column]
    for reductions in (0.0, 2.0, 4.0):
        assert Row(cell=cell, measures=measures | {"reductions": reductions}).missed == ["reductions"]


def test_only_what_adamw_and_bf16_cannot_hold_is_without_limit(measures: dict[str, Any]) -> None:
    adamw = Cell(group=ADAMW, ranks=2, optimizer="adamw")
    assert Row(cell=adamw, measures=measures | {"weights": 1e-3}).missed == []
    assert Row(cell=adamw, measures=measures | {"weights": 1e-3, "gradient": 1e-3}).missed == ["gradient"]
    bf16 = Cell(group=BF16, ranks=2, precision="bf16")
    assert Row(cell=bf16, measures=measures | {"gradient": 1e-2, "reductions": 4.0}).missed == ["reductions"]


def test_a_fault_must_be_seen(measures: dict[str, Any]) -> None:
    fault = Cell(group=FAULTS, ranks=2, fault="other draws")
    assert Row(cell=fault, measures=measures).missed == ["gradient"]
    assert Row(cell=fault, measures=measures | {"gradient": 0.5}).missed == []


def test_the_page_says_what_is_not_met(measures: dict[str, Any]) -> None:
    good = Row(cell=Cell(group=TOPOLOGY, ranks=1), measures=measures)
    bad = Row(cell=Cell(group=TOPOLOGY, ranks=2), measures=measures | {"weights": 3.21e-4})
    page = render([good, bad], seconds=90)
    assert "**1 of 2 rows that must hold do.**" in page
    assert "| 1 | 5.0e-07 | 5.0e-07 | 5.0e-07 | 5.0e-07 | 5.0e-07 | 1.00 | met |" in page
    assert "| 2 | 5.0e-07 | 5.0e-07 | 5.0e-07 | **3.2e-04** | 5.0e-07 | 1.00 | not met |" in page
