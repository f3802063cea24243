"""The plan: a pure division of rows, stable under growth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import ShardConfig
from data_pipeline.manifest_row import Caption, ManifestRow
from data_pipeline.plan import Task, extend_plan, plan_tasks, read_plan
from data_pipeline.settings import UserError, check_settings


def make_config(**changes: Any) -> ShardConfig:
    values = {"manifest": "m.jsonl", "out_dir": "out", "rows_per_task": 4}
    return check_settings(ShardConfig, {**values, **changes}, "test")


def make_rows(begin: int, end: int) -> list[ManifestRow]:
    return [
        ManifestRow(
            id=f"r{n}", video=f"{n}.mp4", captions=(Caption(text=f"{n}"),), split="test" if n % 3 == 0 else "train"
        )
        for n in range(begin, end)
    ]


def ids(tasks: list[Task]) -> list[str]:
    return [row.id for task in tasks for row in task.rows]


def test_every_row_is_in_one_task_of_its_split() -> None:
    rows = make_rows(0, 23)
    tasks = plan_tasks(rows, make_config())
    assert sorted(ids(tasks)) == sorted(row.id for row in rows)
    assert [task.number for task in tasks] == list(range(len(tasks)))
    for task in tasks:
        assert len(task.rows) <= 4
        assert {row.split for row in task.rows} == {task.split}
    for split in ("train", "test"):
        in_split = [row.id for task in tasks if task.split == split for row in task.rows]
        assert in_split == [row.id for row in rows if row.split == split]


def test_the_digest_covers_rows_and_what_decides_bytes() -> None:
    rows = make_rows(0, 4)
    digest = plan_tasks(rows, make_config())[0].digest
    assert digest == plan_tasks(make_rows(0, 4), make_config())[0].digest
    assert digest == plan_tasks(rows, make_config(out_dir="other", manifest="n.csv", ray={"num_cpus": 3}))[0].digest
    for change in (
        {"video": {"crf": 30}},
        {"audio": {"channels": 2}},
        {"max_samples_per_shard": 5},
        {"require": ["audio"]},
    ):
        assert digest != plan_tasks(rows, make_config(**change))[0].digest
    assert digest != plan_tasks([*rows[:3], make_rows(7, 8)[0]], make_config())[0].digest


def test_growth_adds_tasks_and_moves_none(tmp_path: Path) -> None:
    config = make_config()
    first = extend_plan(make_rows(0, 10), config, tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "plan").iterdir()}
    assert extend_plan(make_rows(0, 10), config, tmp_path) == first
    shuffled = [*make_rows(10, 13), *make_rows(0, 10)]
    second = extend_plan(shuffled, config, tmp_path)
    assert second[: len(first)] == first
    assert sorted(ids(second[len(first) :])) == ["r10", "r11", "r12"]
    assert len({task.number for task in second}) == len(second)
    assert {name: (tmp_path / "plan" / name).read_bytes() for name in before} == before
    assert read_plan(tmp_path) == (second, config.bytes_config())


def test_what_would_mix_two_datasets_is_refused(tmp_path: Path) -> None:
    rows = make_rows(0, 10)
    extend_plan(rows, make_config(), tmp_path)
    changed = [*rows[:9], ManifestRow(id="r9", video="other.mp4", split="test")]
    for mistake, config, words in (
        (changed, make_config(), "1 rows .* are changed .*'r9'"),
        (rows[1:], make_config(), "1 rows .* are gone .*'r0'"),
        (rows, make_config(video={"crf": 20}), "was sharded with video.crf 23, the configuration says 20"),
        (rows, make_config(clip={"max_s": 9.0}), "was sharded with clip.max_s null, the configuration says 9.0"),
    ):
        with pytest.raises(UserError, match=words) as error:
            extend_plan(mistake, config, tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / "plan" / "generation-0000.jsonl").write_text("{}")
    with pytest.raises(UserError, match="not readable"):
        extend_plan(rows, make_config(), tmp_path)


def test_mistakes_in_a_configuration_are_one_line() -> None:
    for change, words in (
        ({"video": {"mode": "copy"}, "clip": {"mode": "fixed"}}, "video.mode copy cannot cut"),
        ({"audio": {"codec": "opus", "sample_rate_hz": 22_050}}, "opus has the sample rates"),
        ({"clips": {}}, "clips: unknown key; did you mean 'clip'"),
        ({"require": ["sound"]}, "require.0"),
    ):
        with pytest.raises(UserError, match=words):
            make_config(**change)
