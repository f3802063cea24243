"""What a run bears, what ends it, and what it says: losses that are not finite, ranks that hang, steps made again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.settings import load_settings
from pretrain.checkpoint import checkpoint_name, finished_checkpoints, read_progress
from pretrain.collectives import World
from pretrain.config import RunConfig
from pretrain.report.history import read_run
from pretrain.report.overview import warnings_of
from pretrain.run_log import METRICS, StageClock, read_lines
from pretrain.stored_tensors import StoredTensors
from pretrain.trainer import Trainer
from tests.ranks import run_ranks
from tests.test_resume import command, finish, start, wait_for_step, write_config

BAD_STEP = 3


def train_with_a_bad_step(world: World, argument: list[Any]) -> int:
    """A run in which the video embeddings of rank 1 are no numbers in some steps."""
    path, bad_steps = argument
    trainer = Trainer(load_settings(RunConfig, Path(path)), world)

    def spoil(module: nn.Module, inputs: Any, output: dict[str, Tensor]) -> dict[str, Tensor]:
        if world.rank == 1 and trainer.session.progress.step + 1 in bad_steps and module.training:
            return {view: rows * torch.nan for view, rows in output.items()}
        return output

    model = trainer.session.engine.model
    assert isinstance(model.towers, nn.Module)
    model.towers.get_submodule("towers.video").register_forward_hook(spoil)
    return trainer.run()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("stage", "chunk"), [pytest.param(0, 1, marks=SLOW), (2, 3), pytest.param(3, 1, marks=SLOW)])
def test_a_step_that_is_not_finite_changes_nothing_and_is_recorded(
    tmp_path: Path, small_dataset: Path, stage: int, chunk: int
) -> None:
    run = tmp_path / "run"
    train = {"global_batch": 6, "chunk": chunk, "zero_stage": stage, "log_samples": True}
    config = write_config(
        tmp_path / "config.yaml", small_dataset, run, train=train, schedule={"num_steps": 5},
        checkpoint={"every_steps": 1, "keep_last": 10}, validation={"every_steps": 100},
    )  # fmt: skip
    assert run_ranks("tests.test_faults:train_with_a_bad_step", 2, tmp_path / "ranks", [str(config), [BAD_STEP]]) == [
        0,
        0,
    ]
    checkpoints = {path.name: StoredTensors(path) for path in finished_checkpoints(run)}
    steps = [checkpoints[checkpoint_name(step)] for step in range(1, 6)]
    for before, after, changes in zip(steps, steps[1:], (True, False, True, True), strict=False):
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same == (not changes)
    records = {record["step"]: record for record in read_lines(run / METRICS)}
    assert [records[step]["skipped"] for step in range(1, 6)] == [0, 0, 1, 0, 0]
    assert "loss" not in records[BAD_STEP]
    json.loads((run / METRICS).read_text().splitlines()[BAD_STEP - 1], parse_constant=pytest.fail)
    skipped = [read_lines(run / "skipped_steps" / f"rank-0000{rank}.jsonl") for rank in (0, 1)]
    assert [[record["step"] for record in lines] for lines in skipped] == [[BAD_STEP], [BAD_STEP]]
    drawn = [read_lines(run / "samples" / f"rank-0000{rank}.jsonl")[BAD_STEP - 1] for rank in (0, 1)]
    assert [lines[0]["keys"] for lines in skipped] == [record["keys"] for record in drawn]
    assert any("1 of 5 steps were skipped" in line for line in warnings_of(read_run(run)))
    progress = read_progress(finished_checkpoints(run)[-1])
    assert (progress.step, progress.num_updates, progress.num_skipped) == (5, 4, 0)


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path, small_dataset: Path) -> None:
    run = tmp_path / "run"
    config = write_config(
        tmp_path / "config.yaml", small_dataset, run, optimizer={"lr": 1e30}, faults={"max_skipped_steps": 2},
        schedule={"num_steps": 14, "warmup_steps": 0},
    )  # fmt: skip
    output = finish(config, 2, expected_code=2)
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, output
    assert "not finite for 3 steps in a row, faults.max_skipped_steps allows 2" in lines[0]
    assert "parallelotope replay" in lines[0]
    skipped = [record["step"] for record in read_lines(run / "skipped_steps" / "rank-00001.jsonl")]
    assert len(skipped) == 3
    assert max(record["step"] for record in read_lines(run / METRICS)) == skipped[-1]


def test_a_run_that_reads_nothing_any_more_ends(tmp_path: Path, small_dataset: Path) -> None:
    """Captions come from the index, so steps would go on without a picture, over the checkpoints that are good."""
    dataset = tmp_path / "dataset"
    shutil.copytree(small_dataset, dataset)
    for tar in dataset.glob("*.tar"):
        os.truncate(tar, 512)
    config = write_config(
        tmp_path / "config.yaml", dataset, tmp_path / "run", faults={"max_unreadable_steps": 2},
        schedule={"num_steps": 14, "warmup_steps": 0}, validation={"every_steps": 100},
    )  # fmt: skip
    output = finish(config, 2, expected_code=2)
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, output
    assert "step 3: " in lines[0]
    assert "as in the 2 steps before; faults.max_unreadable_steps allows 2" in lines[0]
    assert "data problems" in next(line for line in output.splitlines() if line.startswith("step 1/14"))
    assert [record["step"] for record in read_lines(tmp_path / "run" / METRICS)] == [1, 2, 3]


def descendants(pid: int) -> Iterator[int]:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(child)
        yield from descendants(int(child))


def rank_process(launcher: int, rank: int) -> int:
    for pid in descendants(launcher):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment and b"pretrain" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow  # waits for what does not come
def test_a_rank_that_hangs_ends_the_run_and_the_stage_is_named(tmp_path: Path, small_dataset: Path) -> None:
    run = tmp_path / "run"
    config = write_config(
        tmp_path / "config.yaml", small_dataset, run, schedule={"num_steps": 10_000},
        faults={"stage_timeout_s": 15.0}, validation={"every_steps": 10_000},
    )  # fmt: skip
    process = start(config, 2)
    wait_for_step(run, 2, process)
    stopped = rank_process(process.pid, 1)
    os.kill(stopped, signal.SIGSTOP)
    started = time.monotonic()
    output, _ = process.communicate(timeout=240)
    assert time.monotonic() - started < 120
    assert process.returncode == 70, output
    lines = [line for line in output.splitlines() if line.startswith("error: rank 0, step ")]
    assert len(lines) == 1, output
    assert "in stage '" in lines[0]
    assert "faults.stage_timeout_s is 15" in lines[0]
    assert "rank 0 of 2 exited with code 70" in output
    assert not Path(f"/proc/{stopped}").exists() or "Z" in Path(f"/proc/{stopped}/stat").read_text().split()[2]


def test_the_clock_knows_the_stage_under_way() -> None:
    clock = StageClock(torch.device("cpu"))
    with clock.stage("objective"):
        with clock.stage("gather"):
            assert clock.position()[0] == "gather"
        assert clock.position()[0] == "objective"
        time.sleep(0.05)
        assert clock.position()[1] >= 0.05
    assert clock.position()[0] not in ("objective", "gather")


@pytest.mark.slow
def test_replay_makes_a_recorded_step_again(tmp_path: Path, small_dataset: Path) -> None:
    run = tmp_path / "run"
    config = write_config(
        tmp_path / "config.yaml", small_dataset, run, schedule={"num_steps": 8}, checkpoint={"keep_every_steps": 3},
    )  # fmt: skip
    finish(config, 2)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for step, source in ((2, "from the beginning"), (5, "step-00000003")):
        command = [sys.executable, "-m", "pretrain.main", "replay", str(run), "--step", str(step)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
        assert done.returncode == 0, done.stderr
        assert source in done.stderr
        cells = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines() if "│" in line]
        told = [(row[2], row[3]) for row in cells]
        recorded = read_lines(run / METRICS)[step - 1]
        for name in ("loss", "grad_norm"):
            values = [float(value) for what, value in told if what == name]
            assert len(values) == 2, "recorded and made again"
            assert all(value == pytest.approx(recorded[name], rel=1e-5) for value in values)
        assert ("weights changed", "yes") in told
        assert any(what == "gradient of towers.audio" for what, _ in told)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    wrong = subprocess.run(
        [sys.executable, "-m", "pretrain.main", "replay", str(run), "--step", "99"], capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert "expected one of 1 to 8" in wrong.stderr


def test_no_room_for_the_log_is_a_line(tmp_path: Path, small_dataset: Path) -> None:
    """TensorBoard's file is the first that may not grow; its thread meets that, not the trainer."""
    data = {"num_workers": 0}  # they hand batches over in files, too
    never = {"checkpoint": {"every_steps": 1000}, "validation": {"every_steps": 1000}}
    config = write_config(tmp_path / "config.yaml", small_dataset, tmp_path / "run", data=data, **never)
    limited = ["prlimit", "--fsize=8192", *command(config, 1)]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "File too large" in errors[0]
    assert "the same command goes on" in errors[0]
