"""Checkpoints as files and as state: written while training goes on, kept by rule, refused or accepted by name."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.settings import UserError
from pretrain.checkpoint import Progress, checkpoint_name, finished_checkpoints, read_description, to_prune
from pretrain.checkpoint_writer import CheckpointWriter, _owners
from pretrain.collectives import World
from pretrain.config import IDENTITY, RunConfig
from pretrain.evaluate import load_run
from pretrain.identity import Identity
from pretrain.run_lock import hold_run
from pretrain.session import Session
from pretrain.stored_tensors import StoredTensors
from pretrain.tensor_file import PIECE_BYTES, write_tensors
from tests.finished_run import run_config
from tests.ranks import run_ranks
from tests.test_resume import finish, write_config

TENSORS = {
    "matrix": torch.randn(3, 5),
    "double": torch.randn(7, dtype=torch.float64),
    "half": torch.randn(3).to(torch.bfloat16),
    "counter": torch.tensor(5),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 4),
    "long": torch.arange(PIECE_BYTES // 4 + 3, dtype=torch.float32),
}


def test_written_tensors_are_what_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    assert write_tensors(path, TENSORS) == hashlib.sha256(path.read_bytes()).hexdigest()
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_large_parameters_are_shared_out_evenly() -> None:
    model = torch.nn.ModuleList(torch.nn.Linear(width, 8, bias=False) for width in (64, 8, 8, 48, 8, 64))
    owners = _owners(model, 2)
    loads = [sum(p.numel() for name, p in model.named_parameters() if owners[name] == rank) for rank in (0, 1)]
    assert max(loads) - min(loads) <= 8 * 48 / 2, loads


def write_empty_checkpoints(run: Path, steps: list[int]) -> None:
    for step in steps:
        folder = run / "checkpoints" / checkpoint_name(step)
        folder.mkdir(parents=True)
        (folder / "checkpoint.json").write_text("{}")


def test_the_newest_the_best_and_every_so_manieth_are_kept(tmp_path: Path) -> None:
    write_empty_checkpoints(tmp_path, [10, 20, 30, 40, 50, 60])
    (tmp_path / "checkpoints" / ".step-00000070.partial").mkdir()

    def names(*arguments: Any) -> list[str]:
        return [path.name for path in to_prune(tmp_path, *arguments)]

    leftover = ".step-00000070.partial"
    assert names(2, 20, 30) == ["step-00000010", "step-00000040", leftover]
    assert names(2, None, None) == ["step-00000010", "step-00000020", "step-00000030", "step-00000040", leftover]
    assert names(9, None, None) == [leftover]
    assert "step-00000060" not in names(0, None, None), "the newest always stays"


def hold_and_save(world: World, argument: str) -> dict[str, Any]:
    """Save while the writing thread is held up, change the weights meanwhile, then let it write."""
    run = Path(argument)
    config = run_config(run, run.parent / "dataset")
    config = config.model_copy(update={"train": config.train.model_copy(update={"zero_stage": 2})})
    session = Session(config, world, None)
    writer = CheckpointWriter(config, session.engine, session.identity, world)
    release = threading.Event()
    writer._thread.submit(release.wait)
    before = {name: p.detach().clone() for name, p in session.engine.trainable()}
    writer.begin(Progress(step=1))
    early = writer.written
    with torch.no_grad():
        for _, parameter in session.engine.trainable():
            parameter.add_(1.0)
    nothing_yet = not finished_checkpoints(run)
    release.set()
    writer.finish()
    stored = StoredTensors(finished_checkpoints(run)[-1])
    same = all(torch.equal(stored[f"weight/{name}"], value) for name, value in before.items())
    writer.close()
    return {"early": early, "nothing_yet": nothing_yet, "same": same, "num_ranks": world.size}


def test_a_save_keeps_the_state_of_its_step_while_training_goes_on(tmp_path: Path, small_dataset: Path) -> None:
    (tmp_path / "dataset").symlink_to(small_dataset)
    for facts in run_ranks("tests.test_checkpoint:hold_and_save", 2, tmp_path / "ranks", str(tmp_path / "run")):
        assert facts == {"early": False, "nothing_yet": True, "same": True, "num_ranks": 2}
    description = read_description(finished_checkpoints(tmp_path / "run")[-1])
    assert sorted(description["files"]) == ["state-00000.safetensors", "state-00001.safetensors"]
    assert description["progress"] == asdict(Progress(step=1))


def averages(world: World, argument: list[Any]) -> dict[str, float]:
    """Three steps under an average: its largest difference from the same average of the weights seen here."""
    dataset, stage = argument
    config = run_config(Path("unused"), Path(dataset))
    train = config.train.model_copy(update={"zero_stage": stage, "ema_decay": 0.15})
    session = Session(config.model_copy(update={"train": train}), world, None)
    engine = session.engine

    def whole(part: str) -> dict[str, Tensor]:
        named = engine.model.named_parameters()
        return {n.removeprefix(part): engine.full_weight(p).clone() for n, p in named if n.startswith(part)}

    expected = whole("towers.")
    loader = session.loader()
    for made, batch in zip((1, 2, 3), loader, strict=False):
        session.step(batch)
        keep = min(0.15, made / (9 + made))
        now = whole("towers.")
        expected = {name: keep * expected[name] + (1 - keep) * now[name] for name in now}
    loader.close()
    found = whole("average.")
    moved = max((found[name] - now[name]).abs().max().item() for name in now)
    return {
        "difference": max((found[name] - expected[name]).abs().max().item() for name in expected),
        "moved": moved,
    }


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_the_average_follows_the_towers(tmp_path: Path, small_dataset: Path, stage: int) -> None:
    for facts in run_ranks("tests.test_checkpoint:averages", 2, tmp_path, [str(small_dataset), stage]):
        assert facts["difference"] <= 1e-6
        assert facts["moved"] > 1e-5


def checkpoint_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain.main", "checkpoint", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> Path:
    """Six steps with an average, a checkpoint each."""
    folder = tmp_path_factory.mktemp("saved")
    config = write_config(
        folder / "config.yaml", small_dataset, folder / "run", checkpoint={"every_steps": 1, "keep_last": 10},
        schedule={"num_steps": 6, "warmup_steps": 1},
        train={"global_batch": 6, "chunk": 3, "zero_stage": 1, "threads": 1, "ema_decay": 0.9},
    )  # fmt: skip
    finish(config, 1)
    return folder / "run"


def test_the_average_is_what_is_evaluated(run: Path) -> None:
    _, model, source = load_run(run, "last")
    stored = StoredTensors(source)
    assert model.average is not None
    name = "towers.text.projection.linear.weight"
    assert torch.equal(model.evaluated.get_parameter(name), stored[f"weight/average.{name}"])
    assert not torch.equal(stored[f"weight/average.{name}"], stored[f"weight/towers.{name}"])


@pytest.mark.slow
def test_list_inspect_and_prune(tmp_path: Path, run: Path) -> None:
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    listed = checkpoint_command("list", str(copy), "--verify")
    assert listed.returncode == 0
    assert listed.stdout.count("whole") == 6
    assert "last" in listed.stdout
    told = checkpoint_command("inspect", str(copy), "--step", "4")
    assert "progress.step: 4" in told.stdout
    assert "exp_avg/towers.video" in told.stdout
    wrong = checkpoint_command("inspect", str(copy), "--step", "44")
    assert wrong.returncode == 2
    assert "no checkpoint of step 44" in wrong.stderr

    lock = hold_run(copy)
    refused = checkpoint_command("prune", str(copy))
    os.close(lock)
    assert refused.returncode == 2
    assert "is in use by" in refused.stderr
    best = read_description(finished_checkpoints(copy)[-1])["progress"]["best_step"]
    checkpoint_command("prune", str(copy), "--keep-last", "1", "--dry-run")
    assert len(finished_checkpoints(copy)) == 6
    checkpoint_command("prune", str(copy), "--keep-last", "1", "--keep-every", "3")
    assert [path.name for path in finished_checkpoints(copy)] == [
        checkpoint_name(step) for step in sorted({3, 6, best})
    ]
    victim = finished_checkpoints(copy)[0] / "state-00000.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    damaged = checkpoint_command("list", str(copy), "--verify")
    assert damaged.returncode == 1
    assert "checksum of state-00000.safetensors differs" in damaged.stdout


@pytest.mark.slow
def test_differences_are_refused_until_they_are_accepted(tmp_path: Path, small_dataset: Path, run: Path) -> None:
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    train = {"global_batch": 6, "chunk": 3, "zero_stage": 1, "threads": 1, "ema_decay": 0.9}
    config = write_config(
        tmp_path / "config.yaml", small_dataset, copy, schedule={"num_steps": 8}, train=train,
        objective=[{"name": "infonce", "learn_temperature": False}], optimizer={"name": "sgd"},
    )  # fmt: skip
    output = finish(config, 1, expected_code=2)
    assert "--accept objective --accept optimizer" in output, output
    command = [sys.executable, "-m", "pretrain.main", "pretrain", str(config)]
    done = subprocess.run([*command, "--accept", "objective", "--accept", "optimizer"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "accepted: optimizer is 'adamw' there, 'sgd' here" in done.stderr
    assert "learned scalars of the objective begin afresh" in done.stderr
    stored = StoredTensors(finished_checkpoints(copy)[-1])
    assert finished_checkpoints(copy)[-1].name == checkpoint_name(8)
    assert not any(name.startswith("exp_avg") for name in stored)


def test_an_unknown_difference_is_named(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", tmp_path).model_dump(mode="json")
    with pytest.raises(ValueError, match="datset"):
        RunConfig.model_validate({**config, "accept": ["datset"]})


def test_all_of_an_identity_can_be_accepted(tmp_path: Path) -> None:
    identity = Identity.of(run_config(tmp_path / "run", tmp_path), "digest")
    assert set(json.loads(json.dumps(asdict(identity)))) == set(IDENTITY)


def test_a_checkpoint_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a checkpoint description"):
        StoredTensors(tmp_path)
