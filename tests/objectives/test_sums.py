"""Several objectives as one."""

from __future__ import annotations

from typing import Any

import pytest

from data_pipeline.settings import check_settings
from pretrain.objective_config import OPTIONS
from pretrain.objectives import WeightedSum, build_objective
from pretrain.pairwise import evaluate_terms
from tests.objectives.cases import random_case

BOUND = {"name": "infonce", "anchor": "text", "weight": 0.5, "temperature": 0.1}
VOLUME = {"name": "gram", "label_smoothing": 0.0}
SUM = {"name": "infonce", "pairs": [["text", "video+audio"]]}


def weighted(parts: list[dict[str, Any]]) -> WeightedSum:
    configs = [check_settings(OPTIONS[part["name"]], part, "objective") for part in parts]
    return WeightedSum(configs, ("text", "video", "audio"))


def test_a_sum_is_the_weighted_sum_of_its_parts_and_each_keeps_its_metrics() -> None:
    embeddings = random_case(9, masked=True).embeddings()
    whole = weighted([BOUND, VOLUME, SUM])
    value = evaluate_terms(whole.terms(embeddings, whole.scalars()))
    alone = [build_objective(**{"weight": 1.0, **part})(embeddings).loss.item() for part in (BOUND, VOLUME, SUM)]
    assert value.local_loss.item() == pytest.approx(0.5 * alone[0] + alone[1] + alone[2], rel=1e-6)
    assert "volume/3 modalities" in value.metrics
    assert {name.split("/")[0] for name in value.metrics} == {
        "loss", "num_samples", "positive_cosine", "volume", "gram", "infonce.0", "infonce.2",
    }  # fmt: skip
    contrasts = {"infonce.0/text-video", "infonce.0/text-audio", "gram", "infonce.2/text-video+audio"}
    assert contrasts <= set(value.metrics)
    assert not any(name.startswith("infonce/") for name in value.metrics)
    learned = whole.learned_values(whole.scalars())
    assert learned == pytest.approx(
        {"temperature/infonce.0": 0.1, "temperature/gram": 0.07, "temperature/infonce.2": 0.07}
    )


def test_one_of_a_kind_keeps_its_plain_name() -> None:
    whole = weighted([VOLUME, SUM])
    assert set(whole.learned_values(whole.scalars())) == {"temperature/gram", "temperature/infonce"}
