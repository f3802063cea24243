"""What a run takes of a checkpoint that does not fit it in everything, and what it does with damaged ones."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.settings import UserError, check_settings
from pretrain import checkpoint
from pretrain.checkpoint import (
    Unreadable,
    checkpoint_name,
    damage,
    finished_checkpoints,
    newest_whole,
    set_aside,
)
from pretrain.checkpoint_writer import CheckpointWriter
from pretrain.collectives import World
from pretrain.config import RunConfig
from pretrain.identity import Identity, check_tokenizer
from pretrain.resume import _fresh, newest_checkpoint
from pretrain.run_lock import NAME, check_shared, hold_run
from pretrain.session import Session
from pretrain.stored_tensors import StoredTensors
from tests.finished_run import run_config
from tests.ranks import run_ranks

SCALAR = "objective.parts.0.scalars.values.temperature"
PROJECTION = "towers.towers.text.projection.linear.weight"
ENCODER = "towers.towers.text.encoder.encoder.encoder.layer.0.attention.self.query.weight"


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """The config with some keys of its blocks replaced."""
    values = config.model_dump(mode="json")
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return check_settings(RunConfig, values, "config")


def trained(config: RunConfig, world: World, num_steps: int = 2) -> Path:
    """Some steps and a checkpoint of them."""
    session = Session(config, world, None)
    writer = CheckpointWriter(config, session.engine, session.identity, world)
    loader = session.loader()
    for _, batch in zip(range(num_steps), loader, strict=False):
        session.step(batch)
    loader.close()
    writer.begin(session.progress)
    writer.finish()
    writer.close()
    session.engine.close()
    return finished_checkpoints(Path(config.run_dir))[-1]


def moments(session: Session, name: str) -> float:
    """The largest first moment of a parameter."""
    parameter = session.engine.model.get_parameter(name)
    parts = session.engine.own_slices(parameter, True)
    return max(float(part.values.abs().max()) for key, part in parts.items() if key == "exp_avg")


def resumed(world: World, argument: list[str]) -> list[dict[str, Any]]:
    """One checkpoint taken up by runs that differ from it, in each ZeRO stage."""
    folder, dataset = map(Path, argument)
    found = []
    for stage in (0, 1, 3):
        run = folder / f"stage {stage}"
        config = changed(run_config(run, dataset), train={"zero_stage": stage, "ema_decay": None})
        source = trained(config, world)
        other = changed(
            config,
            embedding_dim=16,
            objective=[{"name": "gram", "temperature_form": "divided", "temperature": 0.2}],
            accept=["embedding_dim", "objective"],
        )
        session = Session(other, world, source)
        before = float(session.engine.full_weight(session.engine.model.get_parameter(SCALAR)))
        facts = {
            "temperature": before,
            "scalar moment": moments(session, SCALAR),
            "projection moment": moments(session, PROJECTION),
            "encoder moment": moments(session, ENCODER),
            "notes": session.notes,
        }
        loader = session.loader()
        metrics, applied = session.step(next(iter(loader)))
        loader.close()
        session.engine.close()
        found.append({**facts, "loss": metrics["loss"], "applied": applied})
    return found


def test_what_is_accepted_starts_afresh_in_every_stage(tmp_path: Path, small_dataset: Path) -> None:
    """A scalar of another form is another number, and moments of another shape belong to nothing."""
    (found,) = run_ranks("tests.test_restore:resumed", 1, tmp_path, [str(tmp_path), str(small_dataset)])
    assert len(found) == 3
    for facts in found:
        assert facts["temperature"] == pytest.approx(0.2)
        assert facts["scalar moment"] == facts["projection moment"] == 0
        assert facts["encoder moment"] > 0
        assert any("begin afresh" in note for note in facts["notes"])
        assert facts["applied"]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert found[0]["loss"] == pytest.approx(found[2]["loss"], rel=1e-4)


def averages(world: World, argument: list[str]) -> dict[str, Any]:
    """An average that begins, one that ends, and weights from a run of another objective."""
    folder, dataset = map(Path, argument)
    plain = changed(run_config(folder / "plain", dataset), train={"zero_stage": 0, "ema_decay": None})
    kept = changed(plain, run_dir=str(folder / "kept"), train={"ema_decay": 0.5})
    sources = trained(plain, world), trained(kept, world)
    begun = Session(changed(kept, run_dir=str(folder / "begun")), world, sources[0])
    ended = Session(changed(plain, run_dir=str(folder / "ended")), world, sources[1])
    initial = changed(kept, run_dir=str(folder / "new"), objective=[{"name": "pmrl"}], init_from=str(folder / "plain"))
    started = Session(initial, world, None)
    stored = StoredTensors(sources[0])
    model = begun.engine.model
    facts = {
        "begun": all(
            torch.equal(model.get_parameter(f"average.{name}"), model.get_parameter(f"towers.{name}"))
            for name, _ in model.towers.named_parameters()
        ),
        "notes": [session.notes[0] for session in (begun, ended)],
        "started": torch.equal(started.engine.model.get_parameter(PROJECTION), stored[f"weight/{PROJECTION}"]),
    }
    for session in (begun, ended, started):
        session.engine.close()
    return facts


def test_an_average_may_begin_and_end_and_weights_come_from_another_objective(
    tmp_path: Path, small_dataset: Path
) -> None:
    (facts,) = run_ranks("tests.test_restore:averages", 1, tmp_path, [str(tmp_path), str(small_dataset)])
    assert facts["begun"]
    assert "keeps no average: it begins as the towers it has" in facts["notes"][0]
    assert "is not taken: train.ema_decay is null" in facts["notes"][1]
    assert facts["started"]


def with_best(config: RunConfig, world: World) -> Path:
    """A checkpoint whose best score is 0.9, of step 1."""
    session = Session(config, world, None)
    writer = CheckpointWriter(config, session.engine, session.identity, world)
    writer.begin(replace(session.progress, step=1, best_score=0.9, best_step=1))
    writer.finish()
    writer.close()
    return finished_checkpoints(Path(config.run_dir))[-1]


def with_more_held_out(dataset: Path, folder: Path) -> tuple[Path, int]:
    """The dataset with another shard in its validation split, and how many samples that had before."""
    grown = Path(shutil.copytree(dataset, folder / "grown"))
    catalogue = json.loads((grown / "dataset.json").read_text())
    number = sum(shard["num_samples"] for shard in catalogue["shards"] if shard["split"] == "val")
    added = next(shard for shard in catalogue["shards"] if shard["split"] == "train")
    catalogue["shards"].append({**added, "split": "val"})
    (grown / "dataset.json").write_text(json.dumps(catalogue))
    return grown, number


def scores(world: World, argument: list[str]) -> list[tuple[float | None, int | None]]:
    """The best score, and its step, of runs that take up a checkpoint."""
    folder, dataset = map(Path, argument)
    grown, number = with_more_held_out(dataset, folder)
    config = changed(
        run_config(folder / "run", dataset),
        data={"validation": {"path": str(dataset), "split": "val"}}, train={"zero_stage": 0},
    )  # fmt: skip
    few = changed(config, run_dir=str(folder / "few"), validation={"max_samples": number})
    in_grown = {"validation": {"path": str(grown), "split": "val"}}
    in_train = {"validation": {"path": str(dataset), "split": "train"}}
    others = [
        (config, [config, changed(config, data=in_grown), changed(config, data=in_train), few]),
        (few, [few, changed(few, data=in_grown)]),
    ]
    found = []
    for begun, taken_up in others:
        source = with_best(begun, world)
        for other in taken_up:
            session = Session(other, world, source)
            found.append((session.progress.best_score, session.progress.best_step))
            said = any("measures something else now: step 1 is the best" in note for note in session.notes)
            assert said == (session.progress.best_score is None)
    return found


def test_a_best_score_is_of_what_it_measures(tmp_path: Path, small_dataset: Path) -> None:
    (found,) = run_ranks("tests.test_restore:scores", 1, tmp_path, [str(tmp_path), str(small_dataset)])
    forgotten = (None, 1)  # its checkpoint is not pruned before there is another one
    expected = [(0.9, 1), forgotten, forgotten, forgotten, (0.9, 1), (0.9, 1)]
    assert [tuple(pair) for pair in found] == expected


@pytest.fixture
def run(tmp_path: Path, small_dataset: Path) -> Path:
    """A run with three checkpoints of the same content."""
    from tests.finished_run import write_run

    write_run(tmp_path / "run", small_dataset)
    first = finished_checkpoints(tmp_path / "run")[0]
    for step in (5, 9):
        shutil.copytree(first, first.with_name(checkpoint_name(step)))
    return tmp_path / "run"


def spoil(path: Path) -> None:
    """Change a byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damaged_ones_are_set_aside_so_that_new_ones_are_the_newest(run: Path) -> None:
    paths = finished_checkpoints(run)
    for path in paths[1:]:
        spoil(path / "state-00000.safetensors")
    found, notes = newest_checkpoint(run, World())
    assert found == paths[0]
    assert [path.name for path in finished_checkpoints(run)] == ["step-00000003"]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == [
        "damaged-step-00000005", "damaged-step-00000009", "step-00000003",
    ]  # fmt: skip
    assert sum("is damaged (checksum of state-00000.safetensors differs)" in note for note in notes) == 2
    assert sum("is now damaged-step-0000000" in note for note in notes) == 2
    assert set_aside(run, 3) == []


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(run: Path) -> None:
    for path in finished_checkpoints(run):
        (path / "state-00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"none of its 3 checkpoints is whole, the oldest: .*step-00000003"):
        newest_checkpoint(run, World())
    assert len(finished_checkpoints(run)) == 3


def test_what_cannot_be_read_now_is_not_passed_over(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is away is not a damaged checkpoint."""
    real: Callable[[Path], str] = checkpoint.file_sha256

    def away(path: Path) -> str:
        if "00000009" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(checkpoint, "file_sha256", away)
    with pytest.raises(Unreadable, match=r"step-00000009: cannot be read: Input/output error"):
        damage(finished_checkpoints(run)[-1])
    with pytest.raises(UserError, match="cannot be read"):
        newest_checkpoint(run, World())
    assert len(finished_checkpoints(run)) == 3


def test_folders_of_other_names_are_no_checkpoints(run: Path) -> None:
    first = finished_checkpoints(run)[0]
    for name in ("step-best", "step-00000005.bak", "step-5", "damaged-step-00000007"):
        shutil.copytree(first, first.with_name(name))
    shutil.copytree(first, first.with_name("step-100000000"))
    assert [path.name for path in finished_checkpoints(run)] == [
        "step-00000003", "step-00000005", "step-00000009", "step-100000000",
    ]  # fmt: skip
    assert newest_whole(run)[0] == first.with_name("step-100000000")


@pytest.mark.parametrize("what", ["a link to what is away", "no folder", "its description is a loop"])
def test_checkpoints_that_cannot_be_seen_are_not_taken_for_none(run: Path, what: str) -> None:
    folder = run / "checkpoints"
    if what == "its description is a loop":  # an error of stat that even root meets
        description = finished_checkpoints(run)[-1] / "checkpoint.json"
        description.unlink()
        description.symlink_to(description)
    else:
        folder.rename(run / "elsewhere")
        folder.write_text("") if what == "no folder" else folder.symlink_to(run / "gone")
    with pytest.raises(Unreadable, match="cannot be read"):
        finished_checkpoints(run)
    with pytest.raises(UserError, match="cannot be read"):
        newest_checkpoint(run, World())


def test_damaged_ones_that_cannot_be_set_aside_are_said(run: Path) -> None:
    last = finished_checkpoints(run)[-1]
    spoil(last / "state-00000.safetensors")
    last.with_name(f"damaged-{last.name}").write_text("in the way")
    with pytest.raises(UserError, match="cannot be set aside: Not a directory"):
        newest_checkpoint(run, World())


def test_scalars_go_on_where_they_mean_the_same(tmp_path: Path, small_dataset: Path) -> None:
    def fresh(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
        was, here = (
            Identity.of(changed(run_config(tmp_path, small_dataset), objective=parts), "") for parts in (before, now)
        )
        return _fresh(asdict(was), here)

    gram, infonce = {"name": "gram"}, {"name": "infonce"}
    assert fresh([gram, infonce], [{**gram, "weight": 0.5, "kernel": "pytorch", "label_smoothing": 0.0}, infonce]) == []
    assert fresh([gram, infonce], [gram, {**infonce, "temperature_form": "divided"}]) == ["objective.parts.1."]
    assert fresh([gram, infonce], [gram]) == ["objective.parts.1."]
    assert fresh([gram], [gram, {**infonce, "learn_temperature": False}]) == ["objective.parts.1."]
    assert fresh([gram], [infonce]) == ["objective.parts.0."]
    assert fresh([gram], [{**gram, "temperature_range": [0.02, 1.0]}]) == ["objective.parts.0."]


def test_a_tokenizer_of_another_name_or_of_none(tmp_path: Path, small_dataset: Path) -> None:
    config = run_config(tmp_path, small_dataset)
    found = asdict(Identity.of(config, ""))
    check_tokenizer(tmp_path, found, config)
    check_tokenizer(tmp_path, {**found, "tokenizer": None}, config)  # no text tower: a missing weight says it
    with pytest.raises(UserError, match=r"'default' was 0123 then and is .* here; use the version"):
        check_tokenizer(tmp_path, {**found, "tokenizer": "0123"}, config)
    found["towers"]["text"]["tokenizer"] = "hf:other"
    with pytest.raises(UserError, match=r"with the tokenizer 'hf:other', found 'default' here; expected towers\.text"):
        check_tokenizer(tmp_path, {**found, "tokenizer": "0123"}, config)


def sees(world: World, argument: str) -> str:
    """What a rank says of a run folder; the last rank looks into one of its own."""
    shared = Path(argument)
    lock = hold_run(shared) if world.rank == 0 else None
    mine = shared if world.rank < 2 else shared.with_name("elsewhere")
    if world.rank == 2:
        (mine / NAME).mkdir(parents=True)  # to read it is an error; the others wait for a word, not for an exception
    try:
        check_shared(mine, world, wait_s=3.0)
    except UserError as error:
        return str(error)
    finally:
        if lock is not None:
            os.close(lock)
    return ""


def test_a_run_folder_that_is_not_shared_is_said_at_the_start(tmp_path: Path) -> None:
    assert run_ranks("tests.test_restore:sees", 2, tmp_path, str(tmp_path / "run")) == ["", ""]
    said = run_ranks("tests.test_restore:sees", 3, tmp_path / "apart", str(tmp_path / "apart" / "run"))
    assert all("rank 2 does not see what rank 0 wrote" in line for line in said)


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("pretrain.run_lock.fcntl.flock", none)
    with pytest.raises(UserError, match=r"cannot be locked \(No locks available\)"):
        hold_run(tmp_path)
