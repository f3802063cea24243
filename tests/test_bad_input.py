"""What a person gets wrong: the real command, one line on what was found and expected, exit code 2, no training."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_pipeline.settings import UserError, load_settings
from pretrain.checkpoint import FORMAT_VERSION
from pretrain.config import RunConfig
from pretrain.memory import out_of_memory_said
from tests.test_resume import write_config


def parallelotope(*arguments: str) -> tuple[int, str]:
    """Exit code and everything said; no hub can be reached."""
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.main", *arguments],
        capture_output=True, text=True, timeout=120, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def change(config: Path, path: str, value: Any) -> None:
    """Set a dotted key of a YAML file."""
    content = yaml.safe_load(config.read_text())
    *parents, last = path.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    place[last] = value
    config.write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optimizer", {"learning_rate": 1}, "optimizer.learning_rate: unknown key"),
        ("train.zero_stge", 2, "did you mean 'zero_stage'?"),
        ("train.global_batch", "many", "train.global_batch: Input should be a valid integer"),
        ("train.zero_stage", 4, "found 4"),
        ("embedding_dim", 2, "embedding_dim 2 is smaller than the number of modalities 3"),
        ("data.train.path", "nowhere", "dataset nowhere: no such folder"),
        ("data.train.split", "trian", "did you mean 'train'?"),
        ("objective", [{"name": "gramm"}], "objective.0: name 'gramm'; did you mean 'gram'?"),
        ("objective", [{"name": "gram", "anchor": "txt"}], "did you mean 'text'?"),
        ("towers.video.encoder", "timm:vit_tiny_patch16_224", "its published weights cannot be had"),
        ("towers.video.encoder", "timm:vit_tinny_patch16_224", "no such model"),
        ("towers.text.encoder", "hf:./nowhere", "no such folder"),
        ("towers.video", {"encoder": "timm:resnet18", "pretrained": False, "size_px": 32}, "BatchNorm"),
        ("init_from", "nowhere", "no checkpoint found"),
    ],
)
def test_mistakes_in_a_training_config(tmp_path: Path, small_dataset: Path, key: str, value: Any, said: str) -> None:
    config = write_config(tmp_path / "config.yaml", small_dataset, tmp_path / "run")
    change(config, key, value)
    code, output = parallelotope("pretrain", str(config))
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2, output
    assert len(lines) == 1, output
    assert said in lines[0]
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_ranks_that_do_not_divide_the_global_batch(tmp_path: Path, small_dataset: Path) -> None:
    config = write_config(tmp_path / "config.yaml", small_dataset, tmp_path / "run")
    code, output = parallelotope("launch", "local", str(config), "--ranks", "4")
    assert code == 2
    expected = "train.global_batch 6 is not divisible by 4 ranks; expected one of 1, 2, 3, 6 ranks"
    assert output.splitlines() == [f"error: {expected}"]


def test_dataset_of_another_schema_version(tmp_path: Path, small_dataset: Path) -> None:
    shutil.copytree(small_dataset, tmp_path / "data")
    description = json.loads((tmp_path / "data" / "dataset.json").read_text())
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({**description, "schema_version": 99}))
    config = write_config(tmp_path / "config.yaml", tmp_path / "data", tmp_path / "run")
    code, output = parallelotope("pretrain", str(config))
    assert code == 2
    assert "schema version 99 found, 1 expected" in output
    assert len(output.splitlines()) == 1


def test_no_memory_left_says_what_to_lower(tmp_path: Path, small_dataset: Path) -> None:
    config = write_config(tmp_path / "config.yaml", small_dataset, tmp_path / "run")
    change(config, "towers.text.encoder", {"width": 65536, "depth": 1, "num_heads": 2})
    limit_bytes = 14 << 30  # of addresses: libraries take several GB of them
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.main", "pretrain", str(config)], capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "out of memory" in line
    assert "lower train.chunk (now 1; the result stays the same)" in line
    assert "Traceback" not in done.stderr


def test_the_refusal_of_a_gpu_is_understood(small_dataset: Path, tmp_path: Path) -> None:
    """The text is that of torch's CUDA allocator; no GPU is needed to read it."""
    config = load_settings(RunConfig, write_config(tmp_path / "config.yaml", small_dataset, tmp_path / "run"))
    said = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1 is free."
    with pytest.raises(UserError, match=r"out of GPU memory: 2\.50 GiB asked for at once; lower train\.chunk \(now 1"):
        with out_of_memory_said(config):
            raise torch.OutOfMemoryError(said)


def test_unknown_command_and_missing_run() -> None:
    code, output = parallelotope("evaluate", "nowhere", "--data", "nowhere")
    assert (code, output) == (2, "error: run nowhere: no such folder; expected a run_dir of 'parallelotope pretrain'\n")
    code, output = parallelotope("pretrian")
    assert code == 2
    assert output.startswith("error: command 'pretrian': unknown; did you mean 'pretrain'?")


@pytest.mark.slow
def test_an_old_checkpoint_is_refused_not_misread(tmp_path: Path, trained_run: Path, small_dataset: Path) -> None:
    for change_of, said in (
        (
            lambda d: d.update(format_version=1),
            f"format version 1 found, {FORMAT_VERSION} expected: use the version of",
        ),
        (lambda d: d["identity"].update(tokenizer="0123456789abcdef"), "was trained with another tokenizer: 'default'"),
    ):
        run = tmp_path / said[:6]
        shutil.copytree(trained_run, run)
        for path in (run / "checkpoints").glob("step-*/checkpoint.json"):
            description = json.loads(path.read_text())
            change_of(description)
            path.write_text(json.dumps(description))
        code, output = parallelotope("evaluate", str(run), "--data", str(small_dataset), "--split", "val")
        assert code == 2, output
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert said in line
        code, output = parallelotope("pretrain", str(run / "config.yaml"), f"run_dir={run}")
        assert code == 2, output
        assert "tokenizer" in output or "format version" in output
