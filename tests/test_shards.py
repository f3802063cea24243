"""One task in this process: its tars are WebDataset tars, its accounts add up, and any later change is noticed."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset

from data_pipeline.config import ShardConfig
from data_pipeline.dataset import assemble
from data_pipeline.manifest_row import Caption, ManifestRow
from data_pipeline.plan import extend_plan
from data_pipeline.settings import UserError, check_settings
from data_pipeline.shards import ShardedDataset, read_dataset_json
from data_pipeline.task import finished_record, run_task
from data_pipeline.verify import verify_dataset
from tests.media import write_clip

CONFIG = {
    "manifest": "m",
    "out_dir": "o",
    "rows_per_task": 5,
    "max_samples_per_shard": 3,
    "video": {"short_side_px": 60},
}


def make_rows() -> list[ManifestRow]:
    caption = (Caption(text='Grüße, "q"', source="human"), Caption(text="two"))
    rows = [
        ManifestRow(id=f"r{n}", video="mute.mp4" if n == 2 else "v.mp4", captions=caption if n != 3 else (),
                    split="test" if n > 4 else "train", metadata={"n": n})
        for n in range(8)
    ]  # fmt: skip
    return [
        *rows[:3],
        ManifestRow(id="odd/id", audio="v.mp4", start_s=0.5),
        *rows[3:],
        ManifestRow(id="x", video="gone.mp4"),
    ]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_accounted_dataset(tmp_path_factory.mktemp("dataset"), tmp_path_factory.mktemp("media"))


def write_accounted_dataset(folder: Path, media: Path) -> Path:
    """A finished dataset of ten rows, one of them unusable, in two splits and more shards than tasks."""
    write_clip(media / "v.mp4", duration_s=1.0)
    write_clip(media / "mute.mp4", duration_s=1.0, sound=False)
    config = check_settings(ShardConfig, CONFIG, "test")
    tasks = extend_plan(make_rows(), config, folder)
    records = [run_task(task, str(media), config, folder) for task in tasks]
    assert assemble(folder, tasks, records, config.bytes_config())
    assert not assemble(folder, tasks, records, config.bytes_config())  # nothing new
    assert all(
        finished_record(folder, task) == json.loads(json.dumps(r)) for task, r in zip(tasks, records, strict=True)
    )
    return folder


def test_plain_webdataset_reads_the_tars(dataset: Path) -> None:
    info = json.loads((dataset / "dataset.json").read_text())
    read: dict[str, dict[str, Any]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves it to the collector to close tars
        for shard in info["shards"]:
            for sample in webdataset.WebDataset(str(dataset / shard["path"]), shardshuffle=False):
                assert sample["__key__"] not in read
                read[sample["__key__"]] = {name: data for name, data in sample.items() if not name.startswith("__")}
        gc.collect()
    assert len(read) == 9
    assert set(read["r0-0000"]) == {"mp4", "flac", "json"}
    assert set(read["r2-0000"]) == {"mp4", "json"}
    ours = ShardedDataset(dataset)
    for position in range(len(ours)):
        row = ours.row(position)
        for slot in ("video", "audio", "json"):
            assert ours.read_member(position, slot) == read[row["key"]].get(row[f"{slot}_ext"])
    ours.close()


def test_shards_hold_one_split_and_are_never_overfull(dataset: Path) -> None:
    info = json.loads((dataset / "dataset.json").read_text())
    assert [(shard["path"], shard["split"], shard["num_samples"]) for shard in info["shards"]] == [
        ("shard-000000.tar", "train", 3), ("shard-000000_01.tar", "train", 2), ("shard-000001.tar", "train", 1),
        ("shard-000002.tar", "test", 3),
    ]  # fmt: skip
    assert {split: counts["num_samples"] for split, counts in info["splits"].items()} == {"train": 6, "test": 3}
    assert (info["num_rows"], info["num_samples"], info["num_rejects"]) == (10, 9, 1)
    (reject,) = pq.read_table(dataset / "rejects.parquet").to_pylist()
    assert (reject["row_id"], reject["clip_index"], reject["reason"]) == ("x", None, "missing_file")


def test_a_full_tar_by_bytes(tmp_path: Path) -> None:
    write_clip(tmp_path / "v.mp4", duration_s=1.0)
    config = check_settings(
        ShardConfig, {**CONFIG, "max_samples_per_shard": 100, "max_bytes_per_shard": 60_000}, "test"
    )
    rows = [ManifestRow(id=f"r{n}", video="v.mp4") for n in range(4)]
    (task,) = extend_plan(rows, config, tmp_path)
    record = run_task(task, str(tmp_path), config, tmp_path)
    assert len(record["shards"]) > 1
    assert all(shard["num_bytes"] <= 60_000 + 10_240 for shard in record["shards"])  # tars end in a block of 10 KiB
    assert sum(shard["num_samples"] for shard in record["shards"]) == 4


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def edit_record(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tasks" / "task-000000.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("a byte of a member", lambda f: flip(f / "shard-000000.tar", 5_000), "checksum of"),
    ("a byte of a header", lambda f: flip(f / "shard-000000_01.tar", 0), "SHA-256 of shard-000000_01.tar differs"),
    ("a byte of the padding", lambda f: flip(f / "shard-000000.tar", -1), "SHA-256 of shard-000000.tar differs"),
    ("a byte of an index", lambda f: flip(f / "shard-000001.parquet", 300), "SHA-256 of shard-000001.parquet differs"),
    ("a shorter tar", lambda f: (f / "shard-000001.tar").write_bytes(b""), "has 0 bytes; expected"),
    ("a missing tar", lambda f: (f / "shard-000001.tar").unlink(), "not readable"),
    ("a foreign tar", lambda f: shutil.copy(f / "shard-000001.tar", f / "shard-000009.tar") and None, "in no record"),
    ("a missing record", lambda f: (f / "tasks" / "task-000001.json").unlink(), "no record of this plan"),
    ("a forgotten row", lambda f: edit_record(f, lambda r: r["samples"].pop()), "has no outcome"),
    ("a row twice", lambda f: edit_record(f, lambda r: r["rejects"].append(r["samples"][0])), "each clip once"),
    ("other rejects", lambda f: flip(f / "rejects.parquet", 10), "rejects.parquet: SHA-256 differs"),
    ("other counts", lambda f: replace(f / "dataset.json", '_rows": 10', '_rows": 11'), "num_rows differs"),
]  # fmt: skip


def test_verify_finds_nothing_wrong_with_a_whole_dataset(dataset: Path) -> None:
    report = verify_dataset(dataset)
    assert report.problems == []
    assert {name: report.counts[name] for name in ("rows", "clips", "rejects", "shards")} == {
        "rows": 10, "clips": 9, "rejects": 1, "shards": 4,
    }  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_verify_finds(dataset: Path, tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    damage(folder)
    problems = verify_dataset(folder).problems
    assert any(words in problem for problem in problems), problems


def test_a_task_with_a_shorter_file_is_not_done(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    config = check_settings(ShardConfig, CONFIG, "test")
    first, second, _ = extend_plan(make_rows(), config, folder)
    (folder / "shard-000000_01.tar").write_bytes(b"cut")
    assert finished_record(folder, first) is None
    assert finished_record(folder, second) is not None
    assert finished_record(folder, dataclasses.replace(second, digest="0")) is None


def test_an_unfinished_dataset_is_not_verified(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dataset\.json"):
        verify_dataset(tmp_path)


def test_a_folder_that_never_was_a_dataset_names_one_nearby(tmp_path: Path) -> None:
    for name in ("corpus/plan", "corpus/shards", "alone"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match="sharding has not finished"):
        read_dataset_json(tmp_path / "corpus")
    with pytest.raises(UserError, match="nothing else that sharding writes; expected the output of"):
        read_dataset_json(tmp_path / "alone")
    (tmp_path / "corpus" / "dataset.json").write_text("{}")
    for place in (tmp_path, tmp_path / "corpus" / "shards"):
        with pytest.raises(UserError, match=f"nothing else that sharding writes; did you mean {tmp_path / 'corpus'}"):
            read_dataset_json(place)
