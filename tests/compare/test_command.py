"""`parallelotope compare-objectives` as it is typed: run, killed, run again, mistaken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.compare.cells import CELLS
from tests.compare.small import write_small

ROOT = Path(__file__).resolve().parents[2]
NUM_SEEDS = 6
SEEDS = list(range(NUM_SEEDS))


def command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pretrain.main", "compare-objectives", str(config), *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def run(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(config, *arguments), capture_output=True, text=True, env=environment(), timeout=300, check=False
    )


def results(out_dir: Path) -> dict[str, dict[str, object]]:
    """What every cell's file holds, but for the time it took."""
    found = {path.name: json.loads(path.read_text()) for path in sorted((out_dir / CELLS).glob("*.json"))}
    return {name: {key: value for key, value in cell.items() if key != "seconds"} for name, cell in found.items()}


@pytest.mark.slow
def test_killed_and_run_again_it_is_the_uninterrupted_comparison(tmp_path: Path) -> None:
    whole = write_small(tmp_path / "whole", tmp_path / "whole.yaml", seeds=SEEDS)
    done = run(whole)
    assert done.returncode == 0, done.stderr
    assert "untrained" not in done.stdout
    assert f"written: {tmp_path / 'whole' / 'comparison.md'}" in done.stdout

    killed = write_small(tmp_path / "killed", tmp_path / "killed.yaml", seeds=SEEDS)
    cells = tmp_path / "killed" / CELLS
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
    try:
        deadline = time.monotonic() + 120
        while len(list(cells.glob("*.json"))) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert 3 <= len(before) < 2 * NUM_SEEDS
    again = run(killed)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing was made twice
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert len(results(tmp_path / "killed")) == 2 * NUM_SEEDS

    page = run(killed, "--page-only", "seeds=[0,1,2,3,4,5,6]")
    assert page.returncode == 1  # a seed that nobody has made
    assert "2 cells have no result yet" in page.stdout
    assert "M=3.infonce.seed-6" in (tmp_path / "killed" / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("baseline=infonces", "baseline 'infonces'; did you mean 'infonce'?"),
        ("experiment.budget.num_step=3", "did you mean 'num_steps'?"),
        ("experiment.generator.num_modalities=[1]", "greater than or equal to 2"),
        ("seeds=[1,1]", "one is there twice"),
        ("experiment.budget.batch=65", "budget.batch 65 exceeds generator.num_train 64"),
        ("objectives.1.objective.0.anchor=text", "objective gram: anchor 'text'"),
        ("objectives.1.objective.0.name=grams", "gram"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, override: str, said: str) -> None:
    done = run(write_small(tmp_path / "out", tmp_path / "config.yaml"), override)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_training_config_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    experiment = {"name": "corpus", "run": str(tmp_path / "nowhere.yaml")}
    done = run(write_small(tmp_path / "out", tmp_path / "config.yaml", experiment=experiment))
    assert done.returncode == 2
    assert "nowhere.yaml: no such file" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    done = run(write_small(tmp_path, tmp_path / "config.yaml"))
    assert done.returncode == 2
    assert "holds other things" in done.stderr


def test_a_page_of_nothing_is_refused(tmp_path: Path) -> None:
    done = run(write_small(tmp_path / "out", tmp_path / "config.yaml"), "--page-only")
    assert done.returncode == 2
    assert "no cell has a result" in done.stderr
