"""No command writes into a folder that holds other things, and each knows its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_pipeline.config import ShardConfig
from data_pipeline.settings import UserError, check_settings
from data_pipeline.sharding import shard_dataset
from data_pipeline.target_folder import check_target_folder
from pretrain.config import RunConfig
from pretrain.preflight import check_run
from tests.tiny_dataset import make_sample, noisy_members, write_dataset

WHAT = "one of ours"


@pytest.fixture
def thesis(tmp_path: Path) -> Path:
    """A folder that somebody needs."""
    folder = tmp_path / "my thesis"
    folder.mkdir()
    for name in ("a.tex", "b.tex", "c.tex", "d.tex"):
        (folder / name).write_text("words")
    return folder


def test_new_empty_and_own_folders_are_taken(tmp_path: Path) -> None:
    check_target_folder(tmp_path / "new", "--out", ("part-*",), WHAT)
    assert not (tmp_path / "new").exists()
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "lost+found").mkdir()
    check_target_folder(tmp_path, "--out", ("part-*",), WHAT)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "part-0").touch()
    check_target_folder(tmp_path, "--out", ("part-*",), WHAT)


def test_other_things_are_named(thesis: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_target_folder(thesis, "--out", ("part-*",), WHAT)
    expected = f"--out {thesis}: holds other things (a.tex, b.tex, c.tex, ...); expected a new or empty folder, or "
    assert str(caught.value) == expected + WHAT
    with pytest.raises(UserError, match="a file; expected a new or empty folder"):
        check_target_folder(thesis / "a.tex", "--out", ("part-*",), WHAT)


@pytest.mark.parametrize(("out", "said"), [(".", "the manifest's own folder"), ("shards", "inside the manifest's")])
def test_shard_does_not_write_among_its_sources(tmp_path: Path, out: str, said: str) -> None:
    (tmp_path / "x.mp4").touch()
    config = ShardConfig(manifest=str(tmp_path), out_dir=str(tmp_path / out))
    with pytest.raises(UserError, match=f"out_dir .*: {said}.*; expected a folder outside of it"):
        shard_dataset(config)
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_shard_does_not_write_into_a_folder_of_others(tmp_path: Path, thesis: Path) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text("id,video\na,a.mp4\n")
    with pytest.raises(UserError, match=r"out_dir .*my thesis: holds other things \(a.tex, "):
        shard_dataset(ShardConfig(manifest=str(manifest), out_dir=str(thesis)))
    assert len(list(thesis.iterdir())) == 4


def run_config(data: Path, run_dir: Path) -> RunConfig:
    values = {
        "run_dir": str(run_dir), "data": {"train": {"path": str(data), "split": "train"}},
        "towers": {"video": {}, "text": {}}, "objective": [{"name": "infonce"}],
        "schedule": {"num_steps": 2}, "train": {"global_batch": 2},
    }  # fmt: skip
    return check_settings(RunConfig, values, "test")


def test_a_run_does_not_begin_in_a_folder_of_others(tmp_path: Path, thesis: Path) -> None:
    samples = [make_sample(number, noisy_members(number, 0.5), 0.5) for number in range(2)]
    data = write_dataset(tmp_path / "data", samples, samples_per_shard=2)
    with pytest.raises(UserError, match=r"run_dir .*my thesis: holds other things"):
        check_run(run_config(data, thesis), 1)
    with pytest.raises(UserError, match=r"run_dir .*data: holds other things"):
        check_run(run_config(data, data), 1)
    for first in ("logs", "job.yaml", "config.yaml", ".lock"):  # of a launcher, of `launch slurm`, of rank 0
        run = tmp_path / f"run that began with {first}"
        shutil.copytree(thesis, run)
        (run / first).touch()
        check_run(run_config(data, run), 1)
