"""What a run says on the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.retrieval_report import retrieval_metrics
from pretrain.run_log import VALIDATION, RunLog, read_lines


def test_a_validation_says_how_sure_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = retrieval_metrics(torch.tensor([0, 0]), 5, "text", "video+audio", "volume")
    with RunLog(tmp_path, 0, 0, 10, 5) as log:
        log.validation(4, {"num_samples": 5}, found)
    said = "step 4: validation R@1 100.0 % (95 %: 34.2 to 100.0; chance 20 %; 2 queries)\n"
    assert capsys.readouterr().err == said
    assert read_lines(tmp_path / VALIDATION) == [{"step": 4, "score": 1.0, "num_samples": 5}]
