"""What `orientation` of gram is for, from random weights, seed by seed: configs/compare-orientation.yaml, with fewer
test samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.settings import load_settings
from pretrain.compare.cells import Cell, list_cells
from pretrain.compare.config import CompareConfig, SyntheticConfig
from pretrain.compare.generator import draw_data
from pretrain.compare.intervals import t_interval
from pretrain.compare.synthetic import build, train
from pretrain.retrieval import evaluate_retrieval
from pretrain.retrieval_report import RetrievalReport

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "compare-orientation.yaml"
ALL_PAIRS = ("video-audio", "video-text", "audio-text")
WITH_TEXT = ("video-text", "audio-text")


def embeddings(cell: Cell, experiment: SyntheticConfig) -> dict[str, Tensor]:
    data = draw_data(experiment.generator, cell.modalities, cell.seed)
    encoders, objective = build(cell, experiment)
    train(cell, experiment.budget, encoders, objective, data.train)
    return encoders.embed(data.test)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the command has it: results do not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reports(label: str) -> list[RetrievalReport]:
    """Of twenty seeds."""
    config = load_settings(CompareConfig, CONFIG, ["experiment.generator.num_test=250"])
    assert isinstance(config.experiment, SyntheticConfig)
    cells = [cell for cell in list_cells(config) if cell.label == label]
    assert len(cells) == 20
    return [evaluate_retrieval(embeddings(cell, config.experiment), None, anchor="text") for cell in cells]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_oriented_modalities_end_on_the_side_of_their_text_and_are_found_as_well() -> None:
    off, on = reports("gram"), reports("gram oriented by 2")
    cosines = [[report.positive_cosine[pair] for pair in ALL_PAIRS] for report in on]
    assert all(value is not None and value > 0 for pair in cosines for value in pair), cosines
    assert not any(report.anti_aligned for report in on)

    opposite = [report for report in off if min(report.positive_cosine[pair] or 0.0 for pair in WITH_TEXT) < -0.2]
    assert len(opposite) >= 4  # chance decides: most of twenty
    for report in opposite:
        assert set(report.anti_aligned) & set(WITH_TEXT)
        assert any("text are anti-aligned" in warning and "orientation" in warning for warning in report.warnings)

    def joint(report: RetrievalReport) -> float:
        return report.find("text", ["video", "audio"], "volume").recall_at_1

    difference = t_interval([joint(b) - joint(a) for a, b in zip(off, on, strict=True)])
    assert difference.low is not None
    assert difference.low > -0.02, difference
