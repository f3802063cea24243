"""Several objectives as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_pipeline.settings import check_settings
from pretrain.objective_config import OPTIONS
from pretrain.objectives import WeightedSum, build_objective
from pretrain.pairwise import evaluate_terms
from tests.objectives.cases import gradients, random_case
from tests.objectives.references import REFERENCES

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
    alone = [build_objective(**part | {"weight": 1.0})(embeddings).loss.item() for part in (BOUND, VOLUME, SUM)]
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


def test_means_of_two_parts_are_means_over_their_own_pairs() -> None:
    """One has a pair without a sample and so two that count, the other one that counts: no group is shared."""
    case = random_case(8)
    case.present["audio"][:4] = False
    case.present["video"][4:] = False
    parts = [
        {"name": "infonce", "reduce": "mean"},
        {"name": "infonce", "reduce": "mean", "anchor": "audio", "weight": 0.5},
        {"name": "sigmoid", "reduce": "mean", "weight": 2.0},
    ]
    whole = weighted(parts).double()
    loss = evaluate_terms(whole.terms(case.embeddings(), whole.scalars())).local_loss
    alone = [build_objective(**part).double()(case.embeddings()).loss for part in parts]
    assert loss.item() == pytest.approx(sum(alone).item(), abs=1e-12)
    for one, other in zip(gradients(loss, case), gradients(sum(alone), case), strict=True):
        assert (one - other).abs().max().item() <= 1e-12


def test_an_objective_alone_has_its_weight_too() -> None:
    embeddings = random_case(5).embeddings()
    one, five = (build_objective("gram", weight=weight)(embeddings).loss for weight in (1.0, 5.0))
    assert five.item() == pytest.approx(5 * one.item())


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_to_single_under_autocast_too(name: str, dtype: torch.dtype) -> None:
    half = random_case(6, dtype=dtype)
    single = random_case(6, dtype=torch.float32)
    for there, rows in zip(single.leaves(), half.leaves(), strict=True):
        with torch.no_grad():
            there.copy_(rows)
    objective = build_objective(name)
    expected = objective(single.embeddings()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [objective(case.embeddings()).loss for case in (half, single)]
    assert [loss.dtype for loss in found] == [torch.float32] * 2
    assert [loss.item() for loss in found] == [expected.item()] * 2
    assert all(gradient.isfinite().all() for gradient in gradients(found[0], half))
