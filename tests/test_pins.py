"""A run keeps to the shards it started with."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from data_pipeline.settings import UserError, load_settings
from data_pipeline.shards import ShardedDataset, ShardWriter, write_json
from pretrain.collectives import ALONE
from pretrain.config import DataConfig, RunConfig
from pretrain.data.pins import (
    NAME,
    held_pins,
    keep_accepted,
    open_pinned,
    pins_digest,
    read_pins,
    renewed_pins,
    shared_pins,
    write_pins,
)
from pretrain.run_log import METRICS, read_lines
from tests.test_resume import drawn, finish, losses, write_config
from tests.tiny_dataset import make_sample, noisy_members, write_dataset


def write_captions(folder: Path, first: int, count: int) -> Path:
    """A dataset of captions alone, two a shard."""
    samples = [make_sample(number, {}, 1.0, (f"number {number}",)) for number in range(first, first + count)]
    return write_dataset(folder, samples, samples_per_shard=2)


def grow(folder: Path, count: int, media: bool = False, name: str = "shard-0000") -> None:
    """Append a shard with `count` samples, named so that it sorts before the others, and listed first."""
    description = json.loads((folder / "dataset.json").read_text())
    writer = ShardWriter(folder=folder, name=name, split="train")
    for number in range(900, 900 + count):
        writer.write(make_sample(number, noisy_members(number, 1.0) if media else {}, 1.0))
    description["shards"].insert(0, asdict(writer.close()))
    write_json(folder / "dataset.json", description)


def change_shards(folder: Path, change: str, number: int) -> None:
    """Lose or alter one shard as dataset.json has it."""
    description = json.loads((folder / "dataset.json").read_text())
    if change == "gone":
        del description["shards"][number]
    else:
        description["shards"][number]["sha256"] = "0" * 64
    write_json(folder / "dataset.json", description)


def config_of(*folders: Path) -> DataConfig:
    return DataConfig.model_validate({"train": [{"path": str(folder), "split": "train"} for folder in folders]})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_captions(tmp_path / "data", 0, 6)


def test_a_dataset_that_grew_is_read_as_it_was(folder: Path, tmp_path: Path) -> None:
    data, run = config_of(folder), tmp_path / "run"
    pins, notes = held_pins(run, data)
    assert notes == []
    assert pins == read_pins(run)
    written = json.loads((run / NAME).read_text())["datasets"][0]
    assert [(shard["num_samples"], len(shard["sha256"])) for shard in written["shards"]] == [(2, 64)] * 3
    before = open_pinned(pins, data)
    assert pins_digest(pins) == ShardedDataset(folder, "train").digest
    grow(folder, 5)
    held, notes = held_pins(run, data)
    assert held == pins
    assert notes == [
        f"dataset {folder}, split 'train': 5 new samples in 1 new shards are not used; the run goes on with the 6 it "
        "started with"
    ]
    after = open_pinned(held, data)
    assert [after.row(n) for n in range(len(after))] == [before.row(n) for n in range(6)]
    assert ShardedDataset(folder, "train").digest != pins_digest(held)


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_a_lost_or_changed_shard_is_named(folder: Path, tmp_path: Path, change: str) -> None:
    data, run = config_of(folder), tmp_path / "run"
    held_pins(run, data)
    change_shards(folder, change, 1)
    with pytest.raises(UserError, match=rf"'train': shard-000001.tar is {change}, of 3 that the run started with"):
        held_pins(run, data)
    pins, lines = renewed_pins(run, data)
    assert len(lines) == 1
    write_pins(run, pins)
    assert held_pins(run, data)[1] == []


def test_many_lost_shards_are_one_line(tmp_path: Path) -> None:
    data, run = config_of(write_captions(tmp_path / "data", 0, 12)), tmp_path / "run"
    held_pins(run, data)
    for _ in range(5):
        change_shards(tmp_path / "data", "gone", 0)
    with pytest.raises(UserError, match=r"shard-000002.tar is gone, 2 more, of 6") as caught:
        held_pins(run, data)
    assert "\n" not in str(caught.value)


def test_a_dataset_may_move(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    before, _ = held_pins(run, config_of(folder))
    moved = folder.rename(tmp_path / "elsewhere")
    after, notes = held_pins(run, config_of(moved))
    assert (pins_digest(after), notes) == (pins_digest(before), [])
    assert len(open_pinned(after, config_of(moved))) == 6


def test_another_dataset_or_number_of_them_is_refused(folder: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", write_captions(tmp_path / "other", 100, 6)
    held_pins(run, config_of(folder))
    with pytest.raises(UserError, match=r"data.train: 2 datasets found, 1 expected"):
        held_pins(run, config_of(folder, other))
    with pytest.raises(UserError, match=r"shard-000000.tar is changed"):
        held_pins(run, config_of(other))
    pins, lines = renewed_pins(run, config_of(folder, other))
    assert lines == ["1 datasets were pinned, 2 are now"]
    write_pins(run, pins)
    assert len(held_pins(run, config_of(folder, other))[0]) == 2


def test_pins_that_cannot_be_read_are_a_line(folder: Path, tmp_path: Path) -> None:
    data, run = config_of(folder), tmp_path / "run"
    held_pins(run, data)
    for text in ("{", '{"datasets": [{}]}', "[]"):
        (run / NAME).write_text(text)
        with pytest.raises(UserError, match="no list of shards"):
            held_pins(run, data)


def test_when_a_run_takes_what_is_there_now(folder: Path, tmp_path: Path) -> None:
    """Where its shards are gone before it has made a checkpoint, or where that is accepted; else never."""
    run = tmp_path / "run"
    config = load_settings(RunConfig, write_config(tmp_path / "c.yaml", folder, run, data={"validation": None}))
    accepting = config.model_copy(update={"accept": ("dataset",)})
    first, _ = shared_pins(config, ALONE, begun=False)
    grow(folder, 5)
    assert shared_pins(config, ALONE, begun=False)[0] == first  # also a start that was killed at once goes on
    renewed, notes = shared_pins(accepting, ALONE, begun=True)
    assert [pin.num_samples for pin in renewed] == [11]
    assert read_pins(run) == first, "another difference may still refuse the start"
    keep_accepted(config, renewed)
    assert read_pins(run) == first
    keep_accepted(accepting, renewed)
    assert read_pins(run) == renewed
    assert notes == [
        f"accepted: dataset {folder}, split 'train': 3 shards with 6 samples were pinned, 4 with 11 are now"
    ]
    grow(folder, 2, name="shard-00000")
    kept, notes = shared_pins(accepting, ALONE, begun=True)  # as a requeued job starts again
    assert kept == renewed
    assert "kept; start once without it to accept again" in notes[-1]
    assert shared_pins(config, ALONE, begun=True)[0] == renewed
    again, _ = shared_pins(accepting, ALONE, begun=True)
    assert [pin.num_samples for pin in again] == [13]
    change_shards(folder, "gone", 1)
    with pytest.raises(UserError, match=r"is gone, of 4 .* or go on with --accept dataset"):
        shared_pins(config, ALONE, begun=True)
    assert [pin.num_samples for pin in shared_pins(config, ALONE, begun=False)[0]] == [8]


def test_what_was_accepted_and_is_lost_is_said_and_not_written_before_the_run_goes_on(
    folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = load_settings(RunConfig, write_config(tmp_path / "c.yaml", folder, run, data={"validation": None}))
    accepting = config.model_copy(update={"accept": ("dataset",)})
    shared_pins(config, ALONE, begun=False)
    grow(folder, 5)
    accepted, _ = shared_pins(accepting, ALONE, begun=True)
    keep_accepted(accepting, accepted)
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    data = accepting.data.model_copy(
        update={"train": (accepting.data.train[0].model_copy(update={"path": str(moved)}),)}
    )
    elsewhere = accepting.model_copy(update={"data": data})
    assert [pin.path for pin in shared_pins(elsewhere, ALONE, begun=True)[0]] == [str(moved)]
    grow(moved, 2, name="shard-00000")
    kept, _ = shared_pins(elsewhere, ALONE, begun=True)  # accepted once, wherever it lies now
    assert [pin.num_samples for pin in kept] == [11]
    change_shards(moved, "gone", 1)
    less, notes = shared_pins(elsewhere, ALONE, begun=True)
    assert [pin.num_samples for pin in less] == [8]
    assert notes[0].startswith(f"accepted: dataset {moved}, split 'train': 4 shards with 11 samples were pinned")
    assert read_pins(run) == kept
    keep_accepted(elsewhere, less)
    assert read_pins(run) == less


@pytest.mark.slow
def test_a_run_goes_on_with_its_samples_while_the_dataset_grows(tmp_path: Path, small_dataset: Path) -> None:
    """Two datasets, one of which grows between two starts: as if it had not, on other ranks and workers too."""
    folder = Path(shutil.copytree(small_dataset, tmp_path / "data"))
    other = write_dataset(
        tmp_path / "other", [make_sample(n, noisy_members(n, 1.0), 1.0) for n in range(4)], samples_per_shard=2
    )
    train = [{"path": str(p), "split": "train", "weight": w} for p, w in ((folder, 3.0), (other, 1.0))]

    def write(name: str, stop: int) -> Path:
        config = write_config(
            tmp_path / f"{name}.yaml", folder, tmp_path / name, data={"train": train},
            schedule={"num_steps": 4}, validation={"every_steps": 50}, checkpoint={"every_steps": 2},
        )  # fmt: skip
        content = yaml.safe_load(config.read_text())
        content["schedule"]["num_steps"] = stop
        config.write_text(yaml.safe_dump(content))
        return config

    finish(write("whole", 4), 1)
    finish(write("grown", 2), 1)
    grow(folder, 3, media=True)
    said = finish(write("grown", 4), 2)
    assert "3 new samples in 1 new shards are not used" in said
    assert drawn(tmp_path / "grown") == drawn(tmp_path / "whole")
    records = read_lines(tmp_path / "whole" / METRICS)
    assert 0 < records[0]["epoch/data"] < records[-1]["epoch/data"] < 1.2  # 24 positions, of which some are the other's
    samples = [r for p in (tmp_path / "whole" / "samples").glob("*.jsonl") for r in read_lines(p)]
    assert {number for record in samples for number in record["datasets"]} == {0, 1}
    assert losses(tmp_path / "grown")[-1]["position"] == losses(tmp_path / "whole")[-1]["position"]
    change_shards(folder, "gone", 1)
    assert "shard-000000.tar is gone, of 5 that the run started with" in finish(write("grown", 5), 1, expected_code=2)
