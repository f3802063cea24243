"""`parallelotope embed`: one process, several and accelerate's own starter give one table; a kill costs a part."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import torch

from data_pipeline.settings import UserError
from data_pipeline.shards import ShardedDataset
from pretrain.embed import EmbedJob, embed_dataset
from pretrain.embedding_table import missing_spans
from tests.test_export import live_embeddings
from tests.tiny_dataset import write_mixed_dataset


def embed(export: Path, data: Path, out: Path, *options: str, starter: list[str] | None = None) -> str:
    command = [sys.executable, *(starter or []), "-m", "pretrain.main"]
    done = subprocess.run(
        [*command, "embed", str(export), "--data", str(data), "--out", str(out), "--workers", "0", *options],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def table_of(folder: Path) -> pa.Table:
    return ds.dataset(folder, format="parquet").to_table()


def same_rows(one: pa.Table, other: pa.Table) -> None:
    assert one.column_names == other.column_names
    assert one["key"].to_pylist() == other["key"].to_pylist()
    for name in ("video", "audio", "text"):
        for a, b in zip(one[name].to_pylist(), other[name].to_pylist(), strict=True):
            assert (a is None) == (b is None)
            assert a is None or np.abs(np.subtract(a, b)).max() <= 1e-6


@pytest.fixture(scope="module")
def alone(export_folder: Path, small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "alone"
    said = embed(export_folder, small_dataset, out, "--batch", "4")
    assert "35 samples" in said
    return out


def test_rows_are_those_of_evaluate(alone: Path, trained_run: Path, small_dataset: Path) -> None:
    vectors, present = live_embeddings(trained_run, small_dataset)
    table = table_of(alone).filter(pa.compute.equal(table_of(alone)["split"], "val"))
    dataset = ShardedDataset(small_dataset, "val")
    assert table["key"].to_pylist() == dataset.index["key"].to_pylist()
    for name, rows in vectors.items():
        column = table[name].to_pylist()
        assert [value is not None for value in column] == present[name].tolist()
        for value, row in zip(column, rows, strict=True):
            assert value is None or (torch.tensor(value) - row).abs().max() <= 1e-6


def test_several_processes_give_the_same_table(
    alone: Path, export_folder: Path, small_dataset: Path, tmp_path: Path
) -> None:
    embed(export_folder, small_dataset, tmp_path / "two", "--batch", "4", "--processes", "2")
    same_rows(table_of(alone), table_of(tmp_path / "two"))


@pytest.mark.slow
def test_under_accelerate_launch(alone: Path, export_folder: Path, small_dataset: Path, tmp_path: Path) -> None:
    starter = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--module", "pretrain.main"]
    command = [sys.executable, *starter, "embed", str(export_folder), "--data", str(small_dataset)]
    done = subprocess.run([*command, "--out", str(tmp_path / "two"), "--batch", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same_rows(table_of(alone), table_of(tmp_path / "two"))


@pytest.mark.slow
def test_run_again_it_makes_what_is_missing(
    alone: Path, export_folder: Path, small_dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    embed(export_folder, small_dataset, out, "--batch", "4")
    parts = sorted(out.glob("part-*.parquet"))
    assert len(parts) > 2
    kept = parts[0].stat().st_mtime_ns
    parts[1].unlink()
    (out / f".{parts[1].name}.abc.partial").write_bytes(b"half")  # what a kill leaves
    said = embed(export_folder, small_dataset, out, "--batch", "4")
    assert "12 of them new" in said
    assert parts[0].stat().st_mtime_ns == kept
    same_rows(table_of(alone), table_of(out))
    assert "0 of them new" in embed(export_folder, small_dataset, out, "--batch", "4")


def processes_of(out: Path) -> list[str]:
    """Command lines that name `out`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:  # it has ended meanwhile
            continue
    return [line for line in found if str(out) in line]


@pytest.mark.slow
def test_killed_it_leaves_whole_parts_and_no_process(
    alone: Path, export_folder: Path, small_dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pretrain.main", "embed", str(export_folder), "--data", str(small_dataset)]
    process = subprocess.Popen([*command, "--out", str(out), "--batch", "1", "--workers", "1", "--processes", "2"])
    until_s = time.monotonic() + 120
    while not list(out.glob("part-*")) and time.monotonic() < until_s:
        time.sleep(0.02)
    process.kill()
    process.wait()
    while processes_of(out) and time.monotonic() < until_s:
        time.sleep(0.1)
    assert processes_of(out) == []
    first = sum(len(pa.parquet.read_table(path)) for path in out.glob("part-*"))  # each is whole
    assert first > 0
    said = embed(export_folder, small_dataset, out, "--batch", "4")
    assert f"{35 - first} of them new" in said
    same_rows(table_of(alone), table_of(out))


def test_what_cannot_be_read_is_listed(export_folder: Path, tmp_path: Path) -> None:
    data = write_mixed_dataset(tmp_path / "mixed")
    said = embed(export_folder, data, tmp_path / "out")
    assert "video of 1 samples cannot be read, for example clip-0006" in said
    problems = pa.parquet.read_table(tmp_path / "out" / "_problems.parquet").to_pylist()
    assert [(row["key"], row["modality"]) for row in problems] == [("clip-0006", "video"), ("clip-0006", "audio")]
    rows = {row["key"]: row for row in table_of(tmp_path / "out").to_pylist()}
    assert len(rows) == 14
    assert rows["clip-0006"]["video"] is None
    assert rows["clip-0000"]["audio"] is None  # it has none: no problem
    assert rows["clip-0000"]["problems"] == []


def test_parts_of_another_table_are_refused(alone: Path, export_folder: Path, small_dataset: Path) -> None:
    job = EmbedJob(export=export_folder, data=str(small_dataset), split="val", out=alone, batch_size=4, workers=0)
    with pytest.raises(UserError, match=r"embeddings of another .*split; expected a new folder"):
        embed_dataset(job, 1)


def test_a_folder_of_others_is_refused(export_folder: Path, small_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    job = EmbedJob(export=export_folder, data=str(small_dataset), split="val", out=tmp_path, batch_size=4, workers=0)
    with pytest.raises(UserError, match=r"--out .*: holds other things \(notes.txt\); expected a new or empty folder"):
        embed_dataset(job, 1)


def test_missing_spans_cover_what_is_not_there() -> None:
    assert missing_spans(10, [], 4) == [(0, 4), (4, 8), (8, 10)]
    assert missing_spans(10, [(4, 8)], 4) == [(0, 4), (8, 10)]
    assert missing_spans(10, [(0, 10)], 4) == []
