"""What a run says on the terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.retrieval_report import retrieval_metrics
from pretrain.run_log import METRICS, VALIDATION, RunLog, read_lines
from pretrain.start_notes import CPU_COLLECTIVES, batch_notes, compile_notes


def test_a_validation_says_how_sure_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = retrieval_metrics(torch.tensor([0, 0]), 5, "text", "video+audio", "volume")
    with RunLog(tmp_path, 0, 0, 10, 5) as log:
        log.validation(4, {"num_samples": 5}, found)
    said = "step 4: validation R@1 100.0 % (95 %: 34.2 to 100.0; chance 20 %; 2 queries)\n"
    assert capsys.readouterr().err == said
    assert read_lines(tmp_path / VALIDATION) == [{"step": 4, "score": 1.0, "num_samples": 5}]


def test_the_first_step_is_told_then_each_nth_and_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"loss": 1.0, "lr": 1e-3, "grad_norm": 1.0, "samples_per_s": 5.0, "time_s/step": 0.5}
    with RunLog(tmp_path, 0, 0, 10, 4) as log:
        for step in range(1, 11):
            log.step(step, values)
    told = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == ["step 1/10", "step 4/10", "step 8/10", "step 10/10"]
    assert len(read_lines(tmp_path / METRICS)) == 10


def test_a_compilation_is_announced_where_there_will_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert list(compile_notes()) == ["compiling DeepSpeed's CPU collectives, once: about a minute"]
    (tmp_path / CPU_COLLECTIVES / f"{CPU_COLLECTIVES}.so").touch()
    assert list(compile_notes()) == []
    (tmp_path / CPU_COLLECTIVES / f"{CPU_COLLECTIVES}.so").unlink()
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert list(compile_notes()) == []


def test_the_announced_extension_is_the_one_deepspeed_builds() -> None:
    program = "from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder as b; print(b.NAME)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == CPU_COLLECTIVES


def test_a_batch_larger_than_the_split_is_remarked() -> None:
    (note,) = batch_notes(12, 64)
    assert note.startswith("warning: train.global_batch 64 is larger than the 12 training samples: every batch holds")
    assert list(batch_notes(64, 64)) == []
