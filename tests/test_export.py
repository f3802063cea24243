"""An export is the live model, and loads where neither the run nor the train extra nor a network is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.settings import UserError, load_settings
from data_pipeline.shards import ShardedDataset
from pretrain.config import RunConfig
from pretrain.data.loader import EvalLoader
from pretrain.data.reader import BatchReader
from pretrain.data.tokenize import DEFAULT_PATH
from pretrain.evaluate import embed_split, load_run
from pretrain.export import export_run
from pretrain.grad_cache import no_stage
from pretrain.inference import load_model
from pretrain.towers.torchvision_ops import allow_torchvision
from tests import finished_run
from tests.finished_run import write_run
from tests.test_resume import write_config
from tests.tiny_dataset import write_mixed_dataset

ROOT = Path(__file__).resolve().parent.parent
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}

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


def test_an_export_scores_as_its_objective_aligns(tmp_path: Path) -> None:
    dataset = write_mixed_dataset(tmp_path / "data")
    for name, score, label in (("pmrl", "singular_value", "singular value"), ("centrobind", "centroid", "centroid")):
        write_run(tmp_path / "runs" / name, dataset, name)
        export_run(tmp_path / "runs" / name, tmp_path / name, "last", force=False)
        card = (tmp_path / name / "README.md").read_text()
        assert f"Tuples are scored by **{label}" in card
        assert ("does not see signs" in card) == (name == "pmrl")
        assert load_model(tmp_path / name).config.score == score


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
    with pytest.raises(UserError, match="format version 99 found, 2 expected"):
        load_model(copy)


# Offline in earnest: no cache, no variable that tells a library to stay offline, and no socket to be had.
ENCODE_WITHOUT_NETWORK = """
import socket, sys
def refuse(*arguments, **more): raise OSError("no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch
from pretrain.inference import load_model
inputs = torch.load(sys.argv[2], weights_only=True)
model = load_model(sys.argv[1], "cpu")
with torch.no_grad():
    rows = model.towers(inputs["inputs"], inputs["present"])
torch.save({"towers": rows, "text": model.encode(text=["a red circle"])["text"]}, sys.argv[3])
"""


def published_towers(folder: Path) -> dict[str, dict[str, Any]]:
    """Tower settings with published-style encoders and tokenizer, written to `folder` by transformers."""
    allow_torchvision()
    from transformers import ASTConfig, ASTModel, BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(1)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DEFAULT_PATH), pad_token="[PAD]")
    tokenizer.save_pretrained(folder / "bert")
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **TINY)).save_pretrained(
        folder / "bert"
    )
    ASTModel(ASTConfig(max_length=128, num_mel_bins=32, **TINY)).save_pretrained(folder / "ast")
    return {
        "video": {"encoder": "timm:test_vit", "pretrained": False},
        "audio": {"encoder": f"hf:{folder / 'ast'}"},
        "text": {"encoder": f"hf:{folder / 'bert'}", "tokenizer": f"hf:{folder / 'bert'}"},
    }


def test_published_encoders_load_without_their_folders_or_a_network(tmp_path: Path) -> None:
    dataset = write_mixed_dataset(tmp_path / "data")
    live = write_run(tmp_path / "run", dataset, **published_towers(tmp_path / "published"))
    expected, _ = finished_run.live_embeddings(live, tmp_path / "run", dataset)
    config = load_settings(RunConfig, tmp_path / "run" / "config.yaml")
    batch = BatchReader(ShardedDataset(dataset, "train"), config.towers, config.data.window_s, None, 0).read(
        range(14), [0] * 14, 0, 14
    )
    torch.save({"inputs": batch.inputs, "present": batch.present}, tmp_path / "inputs.pt")
    export_run(tmp_path / "run", tmp_path / "an export", "last", force=False)
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "published", ignore_errors=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    subprocess.run(
        [sys.executable, "-c", ENCODE_WITHOUT_NETWORK, str(tmp_path / "an export"), str(tmp_path / "inputs.pt"),
         str(tmp_path / "rows.pt")],
        env=environment | {"HF_HOME": str(tmp_path / "no cache"), "OMP_NUM_THREADS": "1"}, cwd=ROOT, check=True,
    )  # fmt: skip
    rows = torch.load(tmp_path / "rows.pt", weights_only=True)
    for name in ("video", "audio", "text"):
        torch.testing.assert_close(rows["towers"][name], expected[name], atol=1e-6, rtol=0)
        assert expected[name].std(dim=0).mean() > 1e-3, "all samples alike would prove nothing"
    torch.testing.assert_close(rows["text"].norm(dim=1), torch.ones(1))


def test_the_card_tells_data_and_metrics(trained_run: Path, small_dataset: Path, tmp_path: Path) -> None:
    measured = {
        "checkpoint": "step-00000003", "split": "test", "num_samples": 7, "warnings": ["beware"], "metrics": [
            {"query": "text", "candidates": "video+audio", "score": "volume", "recall_at_1": 0.625, "recall_at_5": 1.0,
             "recall_at_10": 1.0, "recall_at_1_low": 0.5, "recall_at_1_high": 0.75, "median_rank": 1.0,
             "chance_recall_at_1": 0.125, "num_queries": 7, "num_candidates": 8}
        ],
    }  # fmt: skip
    copied = tmp_path / "run"
    shutil.copytree(trained_run, copied)
    (copied / "evaluation-test.json").write_text(json.dumps(measured))
    (copied / "evaluation-val.json").write_text(json.dumps({**measured, "checkpoint": "step-00000001"}))
    (copied / "evaluation-old.json").write_text("{}")
    export_run(copied, tmp_path / "out", "last", force=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| text | video+audio | volume | 62.5 | 50-75 | 100 | 100 | 1 | 12.5 | 7 | 8 |" in card
    assert "measured on step-00000001, not on what is exported" in card
    assert "evaluation-old.json could not be read" in card
    assert "beware" in card
    assert f"23 samples of split train (digest {ShardedDataset(small_dataset, 'train').digest})" in card
    assert "`gram`" in card


FULL_DISK = """
import resource, sys
from pathlib import Path
from data_pipeline.settings import UserError, load_settings
from pretrain.export import export_run
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    export_run(Path(sys.argv[1]), Path(sys.argv[2]), "last", True)
except UserError as error:
    print(error)
"""


def test_a_disk_that_is_full_leaves_the_older_export(trained_run: Path, tmp_path: Path) -> None:
    export_run(trained_run, tmp_path / "out", "last", force=False)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(trained_run), str(tmp_path / "out")],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"export {tmp_path / 'out'}: cannot be written: ")
    assert done.stdout.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


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
