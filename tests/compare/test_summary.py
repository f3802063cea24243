"""Means, paired differences and what may be said of them, from made-up results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pretrain.compare.cells import Cell, list_cells
from pretrain.compare.page import markdown, write_page
from pretrain.compare.summary import NO_DIFFERENCE, Comparison, summarise
from tests.compare.small import small_config, small_values

METRIC = "accuracy/all"
SEEDS = [0, 1, 2, 3, 4]
ENTRIES = [{"label": label, "objective": [{"name": "infonce"}]} for label in ("infonce", "better", "same", "worse")]
# Seeds differ far more than objectives: only pairs show that "better" is.
VALUES = {
    "infonce": [0.1, 0.5, 0.3, 0.9, 0.7],
    "better": [0.12, 0.52, 0.33, 0.92, 0.71],
    "same": [0.11, 0.49, 0.32, 0.87, 0.71],
    "worse": [0.05, 0.45, 0.26, 0.85, 0.64],
}


def made_up(out_dir: Path, left_out: tuple[tuple[str, int], ...] = ()) -> tuple[Any, list[Cell], Comparison]:
    config = small_config(out_dir, objectives=ENTRIES, seeds=SEEDS)
    cells = list_cells(config)

    def result(cell: Cell) -> Mapping[str, Any] | None:
        if (cell.label, cell.seed) in left_out:
            return None
        return {"metrics": {METRIC: VALUES[cell.label][cell.seed]}, "note": "", "seconds": 1.0}

    return config, cells, summarise(config, [(cell, result(cell)) for cell in cells])


def row(comparison: Comparison, label: str) -> Any:
    found = comparison.find("M=3", label, METRIC)
    assert found is not None
    return found


def test_paired_differences_see_what_means_do_not(tmp_path: Path) -> None:
    *_, comparison = made_up(tmp_path)
    better, baseline = row(comparison, "better"), row(comparison, "infonce")
    assert baseline.value.low < better.value.mean < baseline.value.high
    assert better.difference.mean == pytest.approx(0.02)
    assert (better.verdict, baseline.verdict) == ("higher", "baseline")
    assert baseline.difference is None


def test_what_may_be_said(tmp_path: Path) -> None:
    *_, comparison = made_up(tmp_path)
    assert row(comparison, "same").verdict == NO_DIFFERENCE
    assert row(comparison, "worse").verdict == "lower"


def test_only_shared_seeds_are_paired(tmp_path: Path) -> None:
    *_, comparison = made_up(tmp_path, left_out=(("better", 2), ("infonce", 0)))
    better = row(comparison, "better")
    assert (better.value.num, better.difference.num) == (4, 3)
    assert better.difference.mean == pytest.approx((0.02 + 0.02 + 0.01) / 3)
    assert comparison.missing == ["M=3.infonce.seed-0", "M=3.better.seed-2"]


def test_one_shared_seed_says_nothing(tmp_path: Path) -> None:
    *_, comparison = made_up(tmp_path, left_out=tuple(("better", seed) for seed in SEEDS[1:]))
    assert row(comparison, "better").verdict == "one seed: no interval"


def test_without_the_baseline_nothing_is_higher_or_lower(tmp_path: Path) -> None:
    *_, comparison = made_up(tmp_path, left_out=tuple(("infonce", seed) for seed in SEEDS))
    assert row(comparison, "better").verdict == "baseline not measured"


def test_the_page_says_it_in_words(tmp_path: Path) -> None:
    config, cells, comparison = made_up(tmp_path)
    text = "\n".join(markdown(config, comparison, cells))
    statement = next(line for line in text.splitlines() if line.startswith("- accuracy, all"))
    assert "higher: better" in statement
    assert f"{NO_DIFFERENCE}: same" in statement
    assert "lower: worse" in statement
    assert "| better | 5 | 52.0 [" in text


def test_the_page_says_what_is_missing_or_failed(tmp_path: Path) -> None:
    config, cells, comparison = made_up(tmp_path, left_out=(("same", 3),))
    assert "1 cells have no result yet**: M=3.same.seed-3" in "\n".join(markdown(config, comparison, cells))
    diverged = {"metrics": {}, "note": "loss nan at step 2", "seconds": 0.5}
    comparison = summarise(config, [(cell, diverged if cell.label == "worse" else None) for cell in cells])
    assert "- M=3.worse.seed-4: loss nan at step 2" in "\n".join(markdown(config, comparison, cells))


def test_files_hold_every_row(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    config, cells, comparison = made_up(tmp_path)
    written = write_page(config, comparison, cells, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    table = pq.read_table(tmp_path / "comparison.parquet").to_pylist()
    assert [record["objective"] for record in table] == ["infonce", "better", "same", "worse"]
    assert table[1]["difference"] == pytest.approx(0.02)
    assert table[1]["difference_low"] > 0
    assert (tmp_path / "comparison.csv").read_text().count("\n") == 5
    page = (tmp_path / "comparison.html").read_text()
    assert "Plotly" in page
    assert "<script src=" not in page  # it needs nothing else


def test_lines_stand_in_the_order_of_the_config(tmp_path: Path) -> None:
    values = small_values(tmp_path)
    values["experiment"]["generator"]["num_modalities"] = [3, 4]
    bind = {"label": "bind", "each_anchor": True, "objective": [{"name": "infonce"}]}
    triangle = {"label": "triangle", "num_modalities": [3], "objective": [{"name": "triangle", "anchor": "best"}]}
    entries = [bind, triangle, *values["objectives"]]
    config = small_config(tmp_path, experiment=values["experiment"], objectives=entries)
    comparison = summarise(config, [(cell, None) for cell in list_cells(config)])
    assert list(comparison.labels) == ["bind x1", "bind x2", "bind x3", "bind x4", "triangle", "infonce", "gram"]
    assert list(comparison.settings) == ["M=3", "M=4"]
