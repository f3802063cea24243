"""Resume is a non-event: real launched runs, killed, stopped, damaged and moved to other ranks."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_pipeline.settings import UserError
from pretrain import checkpoint
from pretrain.checkpoint import finished_checkpoints, newest_whole
from pretrain.run_log import METRICS, read_lines
from pretrain.stored_tensors import StoredTensors, load_weights

NUM_STEPS, GLOBAL_BATCH, TRAIN_SAMPLES = 14, 6, 23  # an epoch ends inside a batch
TIMES = ("time_s/", "samples_per_s")


def towers(dropout: float) -> dict[str, Any]:
    encoder = {"width": 16, "depth": 1, "num_heads": 2, "dropout": dropout}
    return {
        "video": {"encoder": encoder, "num_frames": 2, "size_px": 32},
        "audio": {"encoder": {**encoder, "time_stride": 8}, "num_mels": 32, "hop_s": 0.02},
        "text": {"encoder": encoder, "max_tokens": 16},
    }


def write_config(path: Path, dataset: Path, run: Path, **changes: Any) -> Path:
    config = {
        "run_dir": str(run),
        "seed": 5,
        "data": {
            "train": {"path": str(dataset), "split": "train"},
            "validation": {"path": str(dataset), "split": "val"},
            "window_s": 1.0,
            "num_workers": 1,
            "block_shards": 2,
        },
        "towers": towers(dropout=0.1),
        "embedding_dim": 12,
        "objective": [{"name": "gram", "orientation": 1.0}],
        "schedule": {"num_steps": NUM_STEPS, "warmup_steps": 2},
        "train": {"global_batch": GLOBAL_BATCH, "chunk": 1, "zero_stage": 2, "log_samples": True, "threads": 1},
        "checkpoint": {"every_steps": 3, "keep_last": 10},
        "validation": {"every_steps": 5},
    }
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value  # type: ignore[dict-item]
    path.write_text(yaml.safe_dump(config))
    return path


def command(config: Path, ranks: int) -> list[str]:
    main = [sys.executable, "-m", "pretrain.main"]
    return (
        [*main, "launch", "local", str(config), "--ranks", str(ranks)]
        if ranks > 1
        else [*main, "pretrain", str(config)]
    )


def start(config: Path, ranks: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(config, ranks), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(config: Path, ranks: int, expected_code: int = 0) -> str:
    process = start(config, ranks)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == expected_code, output
    return output


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not any(record["step"] >= step for record in read_lines(run / METRICS)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no step in time"
        time.sleep(0.002)


def kill_at(config: Path, run: Path, ranks: int, step: int) -> None:
    """SIGKILL launcher and ranks at once, some moment after `step` was logged."""
    process = start(config, ranks)
    wait_for_step(run, step, process)
    time.sleep(random.random() * 0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def state(run: Path) -> StoredTensors:
    return StoredTensors(finished_checkpoints(run)[-1])


def losses(run: Path) -> list[dict[str, Any]]:
    """Every logged number but the times."""
    return [{k: v for k, v in record.items() if not k.startswith(TIMES)} for record in read_lines(run / METRICS)]


def drawn(run: Path) -> list[tuple[int, int, str]]:
    """(step, epoch, key) of every sample trained on, in the order of the global batches."""
    found = []
    for path in sorted((run / "samples").glob("*.jsonl")):
        for record in read_lines(path):
            pairs = zip(record["epochs"], record["keys"], strict=True)
            found += [(record["step"], path.name, place, epoch, key) for place, (epoch, key) in enumerate(pairs)]
    return [(step, epoch, key) for step, _, _, epoch, key in sorted(found)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> Path:
    """A run of two ranks from the first step to the last."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(write_config(folder / "config.yaml", small_dataset, folder / "run"), 2)
    return folder / "run"


def assert_same_run(run: Path, expected: Path) -> None:
    assert [path.name for path in finished_checkpoints(run)] == [path.name for path in finished_checkpoints(expected)]
    found, wanted = state(run), state(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert losses(run) == losses(expected)
    assert drawn(run) == drawn(expected)


def test_every_sample_is_seen_once_an_epoch(uninterrupted: Path) -> None:
    samples = drawn(uninterrupted)
    assert len(samples) == NUM_STEPS * GLOBAL_BATCH
    for epoch in range(NUM_STEPS * GLOBAL_BATCH // TRAIN_SAMPLES):
        keys = [key for _, e, key in samples if e == epoch]
        assert len(keys) == len(set(keys)) == TRAIN_SAMPLES
    assert [record["step"] for record in losses(uninterrupted)] == list(range(1, NUM_STEPS + 1))


def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(
    tmp_path: Path, small_dataset: Path, uninterrupted: Path
) -> None:
    run = tmp_path / "run with a space"
    config = write_config(tmp_path / "config.yaml", small_dataset, run)
    for step in sorted(random.sample(range(1, NUM_STEPS - 1), 2)):
        kill_at(config, run, 2, step)
    output = finish(config, 2)
    assert_same_run(run, uninterrupted)
    assert "resumed from" in output or not finished_checkpoints(run)[:-1]


@pytest.mark.slow
def test_killed_many_times(tmp_path: Path, small_dataset: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", small_dataset, run)
    for _ in range(8):
        reached = max((record["step"] for record in read_lines(run / METRICS)), default=0)
        if reached >= NUM_STEPS - 2:
            break
        kill_at(config, run, 2, random.randint(reached, min(reached + 3, NUM_STEPS - 2)))
    finish(config, 2)
    assert_same_run(run, uninterrupted)


STARTERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "pretrain.main"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--no_local_rank", "--num_gpus", "2", "--module", "pretrain.main"],
}


@pytest.mark.slow
@pytest.mark.parametrize("starter", list(STARTERS))
def test_other_starters_give_the_same_run(
    tmp_path: Path, small_dataset: Path, uninterrupted: Path, starter: str
) -> None:
    config = write_config(tmp_path / "config.yaml", small_dataset, tmp_path / "run")
    arguments = [sys.executable, *STARTERS[starter], "pretrain", str(config)]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(tmp_path / "run", uninterrupted)


def test_stopped_by_a_signal_exits_75_and_goes_on(tmp_path: Path, small_dataset: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", small_dataset, run, checkpoint={"every_steps": 1000})
    process = start(config, 2)
    wait_for_step(run, 4, process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "SIGUSR1" in output
    assert finished_checkpoints(run), "a checkpoint is made on a signal"
    finish(config, 2)
    found, wanted = state(run), state(uninterrupted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert drawn(run) == drawn(uninterrupted)


@pytest.mark.slow
def test_a_run_folder_takes_one_run_at_a_time(tmp_path: Path, small_dataset: Path) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", small_dataset, run, schedule={"num_steps": 10_000})
    first = start(config, 1)
    wait_for_step(run, 1, first)
    output = finish(config, 1, expected_code=2)
    assert f"is in use by process {first.pid} on" in output
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    steps = [record["step"] for record in read_lines(run / METRICS)]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_other_ranks_and_stage_take_the_same_samples(tmp_path: Path, small_dataset: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    for late in [path for path in finished_checkpoints(run) if path.name > "step-00000006"]:
        shutil.rmtree(late)
    config = write_config(tmp_path / "config.yaml", small_dataset, run, train={"zero_stage": 3})
    assert "step-00000006" in finish(config, 1)
    assert drawn(run) == drawn(uninterrupted)
    found, wanted = losses(run), losses(uninterrupted)
    assert found[:6] == wanted[:6]
    # Same weights, samples and dropout: the next loss differs by rounding only. AdamW then amplifies it where gradients
    # are near zero.
    assert math.isclose(found[6]["loss"], wanted[6]["loss"], rel_tol=1e-5)
    assert all(math.isclose(a["loss"], b["loss"], rel_tol=1e-2) for a, b in zip(found, wanted, strict=True))


def test_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    newest, before = finished_checkpoints(run)[-1], finished_checkpoints(run)[-2]
    victim = newest / "state-00001.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    found, notes = newest_whole(run)
    assert found == before
    assert len(notes) == 1
    assert "checksum of state-00001.safetensors differs" in notes[0]


def test_checkpoint_of_another_run_is_refused(tmp_path: Path, small_dataset: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    config = write_config(tmp_path / "config.yaml", small_dataset, run, embedding_dim=16, seed=6)
    output = finish(config, 1, expected_code=2)
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "embedding_dim is 12 there, 16 here" in lines[0]
    assert "seed is 5 there, 6 here" in lines[0]


def test_weights_of_another_shape_are_refused(uninterrupted: Path) -> None:
    source = finished_checkpoints(uninterrupted)[-1]
    with pytest.raises(UserError, match="is of another model"):
        load_weights(torch.nn.Linear(2, 2), StoredTensors(source))


def mounted(folder: Path, size: str) -> bool:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    return done.returncode == 0


def test_full_disk_while_saving_leaves_the_checkpoints_before(tmp_path: Path, small_dataset: Path) -> None:
    disk = tmp_path / "disk"
    if not mounted(disk, "5m"):
        pytest.skip("mounting a small file system needs root")
    try:
        run = disk / "run"
        config = write_config(tmp_path / "config.yaml", small_dataset, run)
        output = finish(config, 2, expected_code=2)
        lines = output.splitlines()
        assert any(line.startswith("error: ") and "No space left on device" in line for line in lines), output
        whole = finished_checkpoints(run)
        assert whole
        assert all(checkpoint.damage(path) is None for path in whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
