"""An export is the live model, and loads where neither the run nor the train extra nor a network is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.settings import UserError
from data_pipeline.shards import ShardedDataset
from pretrain.data.loader import EvalLoader
from pretrain.evaluate import embed_split, load_run
from pretrain.export import export_run
from pretrain.grad_cache import no_stage
from pretrain.inference import load_model
from tests.test_resume import write_config

EXTRA = ("deepspeed", "ninja", "ray", "webdataset", "tensorboard", "plotly")  # jinja2 comes with torch
SIX_LINES = """
from pretrain.inference import load_model
model = load_model({folder!r})
clips = model.encode(video=[{clip!r}] * 2, audio=[{clip!r}, None])
queries = model.encode(text=["red square", "loud tone", "blue"])
scores = model.similarity(queries, clips)
print(tuple(scores.shape), bool(scores.isfinite().all()))
"""
# Packages of the extra cannot be found, as where they are not installed.
REFUSE = f"""
import sys
from importlib.machinery import PathFinder
class WithoutExtra(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {EXTRA} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutExtra
"""


@pytest.fixture(scope="module")
def clip(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video file with a sound track."""
    from tests.media import write_clip

    return write_clip(tmp_path_factory.mktemp("clips") / "a clip.mp4", duration_s=2.0)


def live_embeddings(run: Path, data: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `evaluate` computes for the validation split."""
    config, model, _ = load_run(run, "last")
    loader = EvalLoader(ShardedDataset(data, "val"), config.data, config.towers, batch_size=5)
    found = embed_split(lambda inputs, masks: model(inputs, masks, around=no_stage)[0], loader, config)
    return found[0], found[1]


def test_export_equals_the_live_model(trained_run: Path, export_folder: Path, small_dataset: Path) -> None:
    vectors, present = live_embeddings(trained_run, small_dataset)
    dataset = ShardedDataset(small_dataset, "val")
    rows = range(len(dataset))
    captions = [[c["text"] for c in dataset.row(i)["captions"]] for i in rows]
    model = load_model(export_folder)
    found = model.encode(
        video=[dataset.read_member(i, "video") for i in rows],
        audio=[dataset.read_member(i, "audio") for i in rows],
        text=[texts[0] if texts else None for texts in captions],
        batch_size=5,
    )
    for name, rows_of in vectors.items():
        assert torch.equal(present[name], ~found[name].isnan().any(dim=1)), name
        difference = (found[name] - rows_of)[present[name]].abs().max()
        assert difference <= 1e-6, f"{name}: {difference}"


def test_export_loads_without_run_network_or_the_train_extra(export_folder: Path, clip: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(export_folder, moved)
    program = REFUSE + SIX_LINES.format(folder=str(moved), clip=str(clip))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty cache")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "(3, 2) True"


def test_what_needs_the_extra_says_so(tmp_path: Path, small_dataset: Path, trained_run: Path) -> None:
    config = write_config(tmp_path / "config.yaml", small_dataset, tmp_path / "run")
    for command, package in ((["pretrain", str(config)], "deepspeed"), (["report", str(trained_run)], "plotly")):
        program = REFUSE + f"from pretrain.main import main\nsys.argv = {['parallelotope', *command]!r}\nmain()"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert package in line
        assert "pip install 'parallelotope[train]'" in line


def test_card_and_config_say_where_it_comes_from(export_folder: Path) -> None:
    card = (export_folder / "README.md").read_text()
    for expected in ("load_model", "video", "step 3 of 3", "objective `gram`"):
        assert expected in card, expected
    config = json.loads((export_folder / "config.json").read_text())
    assert config["origin"]["step"] == 3
    assert config["score"] == "volume"


def test_nothing_is_overwritten_by_mistake(trained_run: Path, export_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / "a.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="a folder that is no export and not empty"):
        export_run(trained_run, other, "last", force=True)
    copy = tmp_path / "copy"
    shutil.copytree(export_folder, copy)
    with pytest.raises(UserError, match="--force to replace it"):
        export_run(trained_run, copy, "last", force=False)
    export_run(trained_run, copy, "last", force=True)
    load_model(copy)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_no_export_or_damaged_is_refused(trained_run: Path, export_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match="this is a run: 'parallelotope export"):
        load_model(trained_run)
    copy = tmp_path / "copy"
    shutil.copytree(export_folder, copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="its checksum is not the one in"):
        load_model(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99 found, 1 expected"):
        load_model(copy)


@pytest.mark.slow
def test_the_base_install_is_enough(export_folder: Path, clip: Path, small_dataset: Path, tmp_path: Path) -> None:
    """A new environment with the base dependencies only."""
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--editable", str(root)], check=True, capture_output=True
    )
    listed = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout.lower()
    assert not {line.split()[0] for line in listed.splitlines()[2:]} & set(EXTRA)
    program = SIX_LINES.format(folder=str(export_folder), clip=str(clip))
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "(3, 2) True"
    embed = [python, "-m", "pretrain.main", "embed", str(export_folder), "--data", str(small_dataset)]
    subprocess.run([*embed, "--out", str(tmp_path / "rows"), "--processes", "2"], check=True, cwd=tmp_path)
