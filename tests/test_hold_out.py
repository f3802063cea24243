"""Rows that name no split are dealt out by their ids: stable, in the stated shares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.config import ShardConfig
from data_pipeline.hold_out import held_out_split
from data_pipeline.manifest import read_manifest

IDS = [f"clip {number}" for number in range(4000)]


def test_shares_are_those_asked_for() -> None:
    splits = [held_out_split(row_id, {"val": 0.1, "test": 0.05}) for row_id in IDS]
    assert abs(splits.count("val") / len(IDS) - 0.1) < 0.015
    assert abs(splits.count("test") / len(IDS) - 0.05) < 0.012
    assert splits.count("train") == len(IDS) - splits.count("val") - splits.count("test")


def test_a_split_appended_moves_nobody_between_the_others() -> None:
    before = {row_id: held_out_split(row_id, {"val": 0.1}) for row_id in IDS}
    after = {row_id: held_out_split(row_id, {"val": 0.1, "test": 0.1}) for row_id in IDS}
    assert {row_id for row_id in IDS if before[row_id] == "val"} == {r for r in IDS if after[r] == "val"}


def test_a_row_keeps_the_split_it_names_and_growth_moves_none(tmp_path: Path) -> None:
    def splits_of(ids: list[str]) -> dict[str, str]:
        path = tmp_path / "manifest.jsonl"
        rows = [{"id": row_id, "video": "x.mp4"} for row_id in ids] + [{"id": "own", "video": "x.mp4", "split": "mine"}]
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return {row.id: row.split for row in read_manifest(str(path), {"val": 0.3}).rows}

    few, many = splits_of(IDS[:50]), splits_of(IDS[:100])
    assert few["own"] == "mine"
    assert {few[row_id] for row_id in IDS[:50]} == {"train", "val"}
    assert all(many[row_id] == split for row_id, split in few.items())


@pytest.mark.parametrize("shares", [{"val": 1.5}, {"val": 0.6, "test": 0.4}, {"val": 0.0}])
def test_shares_that_leave_nothing_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="leave some rows for train"):
        ShardConfig(manifest="m", out_dir="o", hold_out=shares)
