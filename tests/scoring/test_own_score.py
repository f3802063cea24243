"""A run is scored as its objective aligns: in validation and in evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.config import RunConfig
from pretrain.evaluate import anchor_of, headline, joint_scores, own_score
from pretrain.retrieval import evaluate_retrieval
from tests.finished_run import run_config
from tests.scoring.references import unit_rows


def config_of(folder: Path, *objectives: dict[str, Any]) -> RunConfig:
    """A run of video, audio and text under these objectives."""
    config = run_config(folder / "run", folder / "data")
    return RunConfig.model_validate({**config.model_dump(), "objective": list(objectives)})


@pytest.mark.parametrize(
    ("names", "score"),
    [
        (("gram",), "volume"),
        (("triangle",), "volume"),
        (("pmrl",), "singular_value"),
        (("centrobind",), "centroid"),
        (("infonce",), "summed_cosine"),
        (("sigmoid",), "summed_cosine"),
        (("symile",), "summed_cosine"),
        (("unialign",), "summed_cosine"),
        (("infonce", "gram"), "volume"),
        (("pmrl", "gram"), "singular_value"),
    ],
)
def test_the_objective_says_how_tuples_are_scored(tmp_path: Path, names: tuple[str, ...], score: str) -> None:
    config = config_of(tmp_path, *({"name": name} for name in names))
    assert own_score(config) == score
    scores = joint_scores(config)
    assert scores[:2] == ("volume", "summed_cosine")
    assert len(scores) == len(set(scores))
    vectors = {name: unit_rows(6, 8, seed) for seed, name in enumerate(config.towers.names)}
    row = headline(evaluate_retrieval(vectors, None, anchor_of(config), scores), config)
    assert (row.query, row.score) == (anchor_of(config), score)


@pytest.mark.parametrize("name", ["gram", "pmrl", "infonce"])
def test_a_modality_that_points_away_is_said(tmp_path: Path, name: str) -> None:
    config = config_of(tmp_path, {"name": name})
    text = unit_rows(40, 12, 0)
    report = evaluate_retrieval({"text": text, "video": text, "audio": -text}, None, "text", joint_scores(config))
    assert report.find("text", "audio", "cosine").recall_at_1 == 0.0
    assert set(report.anti_aligned) == {"text-audio", "video-audio"}
    assert any("text and audio are anti-aligned" in warning for warning in report.warnings)
