"""The demo: how it watches, kills and recounts a run; and, slowly, the whole of it in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.settings import UserError
from launch.demo import Places, headline, last_step, resumption, run_and_kill

ROOT = Path(__file__).resolve().parent.parent

# Writes a line of metrics every 20 ms up to a last step, then leaves with a code.
RUN = """
import json, sys, time
path, last, code = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for step in range(1, last + 1):
    with open(path, "a") as stream:
        stream.write(json.dumps({"step": step}) + "\\n")
    time.sleep(0.02)
sys.exit(code)
"""


def demo(*arguments: str, cwd: Path = ROOT, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """`parallelotope demo ARGUMENTS...`."""
    command = [sys.executable, "-m", "pretrain.main", "demo", *arguments]
    environment = os.environ | {"COLUMNS": "160", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s)


def write_run(folder: Path, steps: list[int], log: str) -> Places:
    """A run folder with metrics of `steps` and a log of rank 0."""
    places = Places(folder=folder)
    (places.run / "logs").mkdir(parents=True)
    places.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
    (places.run / "logs" / "host-0.log").write_text(log)
    return places


def test_last_step_leaves_out_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == 0
    path.write_text("")
    assert last_step(path) == 0
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert last_step(path) == 2


def test_run_is_killed_at_the_step(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert run_and_kill([sys.executable, "-c", RUN, str(metrics), "3000", "0"], metrics, 5) == 0
    reached = last_step(metrics)
    assert 5 <= reached < 3000
    time.sleep(0.1)
    assert last_step(metrics) == reached  # it really ended


@pytest.mark.parametrize(("code", "expected"), [(7, 7), (0, 1)])
def test_run_that_leaves_by_itself_is_no_kill(tmp_path: Path, code: int, expected: int) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert run_and_kill([sys.executable, "-c", RUN, str(metrics), "2", str(code)], metrics, 100) == expected


def test_resumption_is_read_from_the_last_life(tmp_path: Path) -> None:
    first, second = "resumed from x/step-00000001\n", "resumed from x/checkpoints/step-00000002\n"
    places = write_run(tmp_path, [1, 2, 3], first + second)
    log = places.run / "logs" / "host-0.log"
    assert resumption(places, {log: len(first)}, 3).startswith("resumed from step 2;")
    with pytest.raises(UserError, match="names no checkpoint"):
        resumption(places, {log: len(first + second)}, 3)


@pytest.mark.parametrize("steps", [[1, 2], [1, 3], [1, 2, 2, 3], [1, 2, 3, 4]])
def test_resumption_wants_every_step_once(tmp_path: Path, steps: list[int]) -> None:
    places = write_run(tmp_path, steps, "resumed from x/step-00000001\n")
    with pytest.raises(UserError, match="every step from 1 to 3 once"):
        resumption(places, {}, 3)


def test_headline_says_the_numbers() -> None:
    row = {
        "candidates": "video+audio", "score": "volume", "num_queries": 200, "num_candidates": 256, "recall_at_1": 0.5,
        "recall_at_1_low": 0.4375, "recall_at_1_high": 0.5625, "chance_recall_at_1": 1 / 256,
    }  # fmt: skip
    assert headline(row) == (
        "text -> video+audio by volume: the right one of 256 is found first in 50.0 % of 200 "
        "queries (43.8 to 56.2; chance 0.4 %)"
    )


def test_outside_of_a_clone(tmp_path: Path) -> None:
    done = demo(cwd=tmp_path)
    assert done.returncode == 2
    assert "expected to run in a clone of the repository" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_wrong_key_ends_the_demo_before_it_starts(tmp_path: Path) -> None:
    done = demo("--folder", str(tmp_path / "demo"), "train.chunks=3")
    assert done.returncode == 2
    assert "did you mean 'chunk'?" in done.stderr
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whole_demo_in_small_and_again(tmp_path: Path) -> None:
    small = [
        "--folder", str(tmp_path / "small demo"), "--clips", "60", "schedule.num_steps=12", "schedule.warmup_steps=2",
        "checkpoint.every_steps=4", "validation.every_steps=6", "train.global_batch=16", "train.chunk=2",
    ]  # fmt: skip
    done = demo(*small, timeout_s=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from step" in done.stdout
    assert "text -> video+audio by volume" in done.stdout
    places = Places(folder=tmp_path / "small demo")
    assert last_step(places.metrics) == 12
    assert str((places.run / "report.html").resolve()) in done.stdout.splitlines()[-1]
    for split in ("test", "test-ordinary"):
        report = json.loads((places.run / f"evaluation-{split}.json").read_text())
        assert {row["score"] for row in report["metrics"]} == {"cosine", "volume", "summed_cosine"}
    again = demo(*small, timeout_s=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing is killed this time" in again.stdout
    assert "resumed from step 12" in again.stdout
