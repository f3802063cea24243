"""Cells: which there are, what they are made of, and that a result is kept, skipped, or refused."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from data_pipeline.settings import UserError
from pretrain.compare.cells import CELLS, Cell, Outcome, list_cells, read_result, result_path, run_missing
from tests.compare.small import small_config, small_values


def cells_of(out_dir: Path, **changes: object) -> list[Cell]:
    return list_cells(small_config(out_dir, **changes))


def test_every_entry_in_every_setting_with_every_seed(tmp_path: Path) -> None:
    experiment = small_values(tmp_path)["experiment"]
    experiment["generator"]["num_modalities"] = [3, 4]
    found = cells_of(tmp_path, experiment=experiment)
    assert len(found) == 2 * 2 * 2
    assert len({cell.name for cell in found}) == 8
    assert [cell.seed for cell in found] == [0] * 4 + [1] * 4  # whole seeds: what is there can be compared
    assert found[0].modalities == ("x1", "x2", "x3")


def test_best_and_worst_are_names_of_modalities(tmp_path: Path) -> None:
    entries = [
        {"label": "infonce", "objective": [{"name": "infonce", "pairs": [["worst", "x2+best"]]}]},
        {"label": "gram", "objective": [{"name": "gram", "anchor": "best"}]},
        {"label": "all", "objective": [{"name": "infonce"}]},
    ]
    first, second, third, *_ = cells_of(tmp_path, objectives=entries)
    assert first.facts["objective"][0]["pairs"] == [["x1", "x2+x3"]]
    assert second.facts["objective"][0]["anchor"] == second.anchor == "x3"
    assert third.anchor is None


def test_one_line_an_anchor(tmp_path: Path) -> None:
    entries = [
        {"label": "infonce", "objective": [{"name": "infonce"}]},
        {"label": "bind", "each_anchor": True, "objective": [{"name": "infonce"}]},
        {"label": "three", "num_modalities": [4], "objective": [{"name": "triangle"}]},
    ]
    found = cells_of(tmp_path, objectives=entries, seeds=[0])
    assert [(cell.label, cell.anchor) for cell in found] == [
        ("infonce", None), ("bind x1", "x1"), ("bind x2", "x2"), ("bind x3", "x3"),
    ]  # fmt: skip


def test_missing_cells_are_made_and_the_others_left(tmp_path: Path) -> None:
    cells = cells_of(tmp_path)
    made: list[str] = []

    def make(cell: Cell) -> Outcome:
        made.append(cell.name)
        return Outcome(metrics={"loss": float(len(made))})

    assert run_missing(tmp_path, cells[:2], make) == []
    assert run_missing(tmp_path, cells, make) == []
    assert made == [cell.name for cell in cells]  # each once
    result = read_result(tmp_path, cells[1])
    assert result is not None
    assert result["metrics"] == {"loss": 2.0}


def test_a_cell_that_fails_is_tried_again_and_stops_no_other(tmp_path: Path) -> None:
    cells = cells_of(tmp_path)

    def fail_first(cell: Cell) -> Outcome:
        if cell == cells[0]:
            raise UserError("out of luck")
        return Outcome(metrics={"loss": 1.0})

    failures = run_missing(tmp_path, cells, fail_first)
    assert len(failures) == 1
    assert "out of luck" in failures[0]
    assert cells[0].name in failures[0]
    assert [read_result(tmp_path, cell) is None for cell in cells] == [True, False, False, False]
    assert run_missing(tmp_path, cells, lambda cell: Outcome(metrics={"loss": 2.0})) == []
    assert read_result(tmp_path, cells[0]) is not None


def test_what_another_process_makes_is_left_to_it(tmp_path: Path) -> None:
    cells = cells_of(tmp_path)
    (tmp_path / CELLS).mkdir()
    other = os.open(tmp_path / CELLS / f".{cells[0].name}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        run_missing(tmp_path, cells, lambda cell: Outcome(metrics={}))
    finally:
        os.close(other)
    assert [read_result(tmp_path, cell) is None for cell in cells] == [True, False, False, False]


def test_a_result_of_other_settings_is_refused(tmp_path: Path) -> None:
    cells = cells_of(tmp_path)
    run_missing(tmp_path, cells, lambda cell: Outcome(metrics={}))
    experiment = small_values(tmp_path)["experiment"]
    experiment["budget"]["num_steps"] = 5
    changed = cells_of(tmp_path, experiment=experiment)
    with pytest.raises(UserError, match=r"budget\.num_steps is 4 there, 5 here") as caught:
        read_result(tmp_path, changed[0])
    assert "\n" not in str(caught.value)


def test_more_settings_and_tiles_are_no_other_settings(tmp_path: Path) -> None:
    run_missing(tmp_path, cells_of(tmp_path), lambda cell: Outcome(metrics={}))
    values = small_values(tmp_path)
    values["experiment"]["generator"]["num_modalities"] = [3, 4]
    values["objectives"][0]["objective"][0]["tile"] = 7
    found = cells_of(tmp_path, experiment=values["experiment"], objectives=values["objectives"])
    assert sum(read_result(tmp_path, cell) is not None for cell in found) == 4


@pytest.mark.parametrize("content", ["", "{", "[]", '{"metrics": {}}', '{"metrics": 3, "cell": 4'])
def test_a_damaged_result_is_said(tmp_path: Path, content: str) -> None:
    cell = cells_of(tmp_path)[0]
    result_path(tmp_path, cell).parent.mkdir()
    result_path(tmp_path, cell).write_text(content)
    with pytest.raises(UserError, match="no result of a comparison"):
        read_result(tmp_path, cell)


def test_results_are_json_that_says_what_made_it(tmp_path: Path) -> None:
    cell = cells_of(tmp_path)[3]
    run_missing(tmp_path, [cell], lambda cell: Outcome(metrics={}, note="loss nan at step 3 of 4"))
    found = json.loads(result_path(tmp_path, cell).read_text())
    assert found["note"] == "loss nan at step 3 of 4"
    assert (found["cell"]["label"], found["cell"]["seed"]) == ("gram", 1)
