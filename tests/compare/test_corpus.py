"""A cell of the comparison on real media: the real trainer and the real evaluation, in processes of their own."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.settings import UserError, check_settings
from pretrain.compare.cells import Cell, Outcome, list_cells, read_result, result_path, run_missing
from pretrain.compare.config import CompareConfig, CorpusConfig
from pretrain.compare.corpus import _refuse_other_settings, cell_config, check_cell, run_cell
from tests.finished_run import run_config

ROOT = Path(__file__).resolve().parents[2]


def corpus(folder: Path, dataset: Path, objectives: list[dict[str, Any]]) -> tuple[list[Cell], CorpusConfig]:
    """A comparison whose training config is three steps of three small towers."""
    run = run_config(folder / "unused", dataset).model_dump(mode="json")
    run["train"]["zero_stage"] = 0
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    experiment = {"name": "corpus", "run": str(folder / "pretrain.yaml"), "overrides": ["schedule.num_steps=2"]}
    values = {
        "out_dir": str(folder / "out"), "seeds": [3], "baseline": objectives[0]["label"],
        "experiment": experiment | {"split": "val"}, "objectives": objectives,
    }  # fmt: skip
    config = check_settings(CompareConfig, values, "compare.yaml")
    assert isinstance(config.experiment, CorpusConfig)
    return list_cells(config, cell_config(None, config.experiment, folder / "out")), config.experiment


@pytest.mark.slow
def test_a_cell_is_a_run_of_its_objective_and_seed(tmp_path: Path, small_dataset: Path) -> None:
    entries = [{"label": "gram oriented", "objective": [{"name": "gram", "orientation": 4.0}]}]
    cells, experiment = corpus(tmp_path, small_dataset, entries)
    out_dir = tmp_path / "out"
    check_cell(cells[0], experiment, out_dir)
    assert run_missing(out_dir, cells, lambda cell: run_cell(cell, experiment, out_dir)) == []
    run = yaml.safe_load((out_dir / "runs" / cells[0].name / "config.yaml").read_text())
    assert (run["seed"], run["schedule"]["num_steps"]) == (3, 2)
    assert run["objective"][0]["orientation"] == 4.0
    result = read_result(out_dir, cells[0])
    assert result is not None
    metrics = result["metrics"]
    assert metrics["recall_at_1/text -> others/own"] == metrics["recall_at_1/text -> others/volume"]
    expected = {f"recall_at_1/{a} -> {b}/cosine" for a, b in permutations(("video", "audio", "text"), 2)}
    expected |= {f"recall_at_1/{name} -> others/own" for name in ("video", "audio", "text")}
    expected |= {"recall_at_1/others -> text/own", "recall_at_1/others -> one/summed_cosine"}
    assert expected | {"positive_cosine/video-text", "anti_aligned"} <= set(metrics)
    report = json.loads((out_dir / "runs" / cells[0].name / "evaluation-val.json").read_text())
    assert report["step"] == 2
    for row in report["metrics"]:  # what `evaluate` said, under the names of a comparison
        direction = f"{row['query']} -> {row['candidates']}".replace("video+audio", "others")
        assert metrics[f"recall_at_1/{direction}/{row['score']}"] == row["recall_at_1"]


def test_a_result_of_another_training_config_is_refused(tmp_path: Path, small_dataset: Path) -> None:
    entries = [{"label": "infonce", "objective": [{"name": "infonce"}]}]
    cells, experiment = corpus(tmp_path, small_dataset, entries)
    run_missing(tmp_path, cells, lambda cell: Outcome(metrics={}))
    assert read_result(tmp_path, cells[0]) is not None
    values = yaml.safe_load(Path(experiment.run).read_text())
    values["optimizer"]["lr"] = 0.5
    Path(experiment.run).write_text(yaml.safe_dump(values), encoding="utf-8")
    config = CompareConfig(out_dir="out", seeds=[3], baseline="infonce", experiment=experiment, objectives=entries)
    changed = list_cells(config, cell_config(None, experiment, tmp_path / "out"))
    with pytest.raises(UserError, match=r"experiment\.run\.optimizer\.lr is 0\.001 there, 0\.5 here"):
        read_result(tmp_path, changed[0])


@pytest.mark.slow
def test_a_run_begun_with_other_settings_does_not_go_on(tmp_path: Path, small_dataset: Path) -> None:
    """A run itself may go on under another learning rate; a cell whose result was deleted must not."""
    cells, experiment = corpus(tmp_path, small_dataset, [{"label": "infonce", "objective": [{"name": "infonce"}]}])
    out_dir = tmp_path / "out"
    assert run_missing(out_dir, cells, lambda cell: run_cell(cell, experiment, out_dir)) == []
    result_path(out_dir, cells[0]).unlink()
    faster = experiment.model_copy(update={"overrides": (*experiment.overrides, "optimizer.lr=0.5")})
    failures = run_missing(out_dir, cells, lambda cell: run_cell(cell, faster, out_dir))
    assert len(failures) == 1
    assert "was begun with other settings: optimizer.lr is 0.001 there, 0.5 here; delete it" in failures[0]
    assert str(out_dir / "runs" / cells[0].name) in failures[0]
    assert run_missing(out_dir, cells, lambda cell: run_cell(cell, experiment, out_dir)) == []


def test_a_corpus_that_grew_is_another_experiment(tmp_path: Path, small_dataset: Path) -> None:
    entries = [{"label": "infonce", "objective": [{"name": "infonce"}]}]
    cells, _ = corpus(tmp_path, small_dataset, entries)
    run_missing(tmp_path, cells, lambda cell: Outcome(metrics={}))
    dataset = json.loads((small_dataset / "dataset.json").read_text())
    dataset["shards"][0]["sha256"] = "0" * 64
    other = tmp_path / "other"
    other.mkdir()
    (other / "dataset.json").write_text(json.dumps(dataset))
    run = yaml.safe_load((tmp_path / "pretrain.yaml").read_text())
    run["data"]["train"][0]["path"] = str(other)
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(run))
    values = {"name": "corpus", "run": str(tmp_path / "pretrain.yaml"), "overrides": ["schedule.num_steps=2"]}
    config = check_settings(
        CompareConfig,
        {"out_dir": "out", "seeds": [3], "baseline": "infonce", "experiment": values | {"split": "val"},
         "objectives": entries},
        "compare.yaml",
    )  # fmt: skip
    assert isinstance(config.experiment, CorpusConfig)
    changed = list_cells(config, cell_config(None, config.experiment, tmp_path / "out"))
    with pytest.raises(UserError, match=r"experiment\.datasets\."):
        read_result(tmp_path, changed[0])


@pytest.mark.slow
def test_a_run_that_fails_is_said_with_its_log_and_leaves_no_result(tmp_path: Path, small_dataset: Path) -> None:
    cells, experiment = corpus(tmp_path, small_dataset, [{"label": "infonce", "objective": [{"name": "infonce"}]}])
    broken = experiment.model_copy(update={"overrides": ("init_from=nowhere",)})
    out_dir = tmp_path / "out"
    failures = run_missing(out_dir, cells, lambda cell: run_cell(cell, broken, out_dir))
    assert len(failures) == 1
    assert "parallelotope pretrain left with 2" in failures[0]
    assert f"{cells[0].name}.log" in failures[0]
    assert not result_path(out_dir, cells[0]).exists()


@pytest.mark.slow
def test_no_trainer_is_left_when_the_comparison_is_killed(tmp_path: Path, small_dataset: Path) -> None:
    cells, experiment = corpus(tmp_path, small_dataset, [{"label": "infonce", "objective": [{"name": "infonce"}]}])
    values = {
        "out_dir": str(tmp_path / "out"), "seeds": [3], "baseline": "infonce",
        "experiment": experiment.model_dump(mode="json") | {"overrides": ["schedule.num_steps=100000"]},
        "objectives": [{"label": "infonce", "objective": [{"name": "infonce"}]}],
    }  # fmt: skip
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [sys.executable, "-m", "pretrain.main", "compare-objectives", str(tmp_path / "compare.yaml")]
    lock = tmp_path / "out" / "runs" / cells[0].name / ".lock"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (lock.exists() and is_locked(lock)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 20
    while is_locked(lock):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a run."""
    with path.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_mistakes_are_said_before_anything_is_trained(tmp_path: Path, small_dataset: Path) -> None:
    cells, experiment = corpus(
        tmp_path, small_dataset, [{"label": "a", "objective": [{"name": "gram", "anchor": "vidio"}]}]
    )
    with pytest.raises(UserError, match="did you mean 'video'"):
        check_cell(cells[0], experiment, tmp_path / "out")
    cells, experiment = corpus(tmp_path, small_dataset, [{"label": "a", "objective": [{"name": "gram"}]}])
    elsewhere = experiment.model_copy(update={"overrides": (f"data.train.0.path={tmp_path / 'nothing'}",)})
    with pytest.raises(UserError, match="nothing"):
        check_cell(cells[0], elsewhere, tmp_path / "out")


@pytest.mark.parametrize("key", [{"freeze_anchor": True}, {"each_anchor": True}, {"lr": 1e-3}])
def test_what_the_trainer_cannot_do_is_refused(tmp_path: Path, small_dataset: Path, key: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="for the synthetic experiment only"):
        corpus(
            tmp_path,
            small_dataset,
            [{"label": "a", "objective": [{"name": "gram"}]}, {"label": "b", "objective": [{"name": "gram"}], **key}],
        )


def test_a_page_of_a_corpus_that_is_gone(tmp_path: Path, small_dataset: Path) -> None:
    data = Path(shutil.copytree(small_dataset, tmp_path / "data"))
    entries = [{"label": "infonce", "objective": [{"name": "infonce"}]}]
    cells, experiment = corpus(tmp_path, data, entries)
    run_missing(tmp_path, cells, lambda cell: Outcome(metrics={"anti_aligned": 0.0}))
    shutil.rmtree(data)
    config = CompareConfig(out_dir="out", seeds=[3], baseline="infonce", experiment=experiment, objectives=entries)
    run = cell_config(None, experiment, tmp_path / "out")
    with pytest.raises(UserError, match="no such folder"):
        list_cells(config, run)
    (cell,) = list_cells(config, run, page_only=True)
    result = read_result(tmp_path, cell)
    assert result is not None
    assert result["metrics"] == {"anti_aligned": 0.0}


def test_a_run_is_the_same_however_its_folder_is_spelled(tmp_path: Path, small_dataset: Path) -> None:
    cells, experiment = corpus(tmp_path, small_dataset, [{"label": "infonce", "objective": [{"name": "infonce"}]}])
    config = cell_config(cells[0], experiment, tmp_path / "out")
    path = tmp_path / "begun.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    elsewhere = config.model_copy(update={"run_dir": os.path.relpath(config.run_dir)})
    assert elsewhere.run_dir != config.run_dir
    _refuse_other_settings(tmp_path, path, elsewhere)
    with pytest.raises(UserError, match="begun with other settings: seed is 3 there, 4 here"):
        _refuse_other_settings(tmp_path, path, elsewhere.model_copy(update={"seed": 4}))
