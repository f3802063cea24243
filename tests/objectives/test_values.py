"""Values and gradients of every objective against the float64 references, and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.objectives import build_objective
from tests.objectives.cases import MOST, gradients, random_case
from tests.objectives.references import REFERENCES

TEMPERED = ("gram", "triangle", "infonce", "sigmoid", "centrobind", "feature_separation")

# Options of ours, and what the reference calls them where it differs.
VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("gram", {"label_smoothing": 0.0, "orientation": 0.5}, {"label_smoothing": 0.0, "orientation_weight": 0.5}),
    ("gram", {"anchor": "video"}, {"anchor": "video"}),
    ("triangle", {"label_smoothing": 0.0, "anchor": "video"}, {"label_smoothing": 0.0, "anchor": "video"}),
    ("infonce", {"anchor": "text", "label_smoothing": 0.1}, {"anchor": "text", "label_smoothing": 0.1}),
    ("infonce", {"reduce": "mean", "within": 0.25}, {"reduce": "mean", "within": 0.25}),
    ("sigmoid", {"anchor": "text", "bias": -3.0}, {"anchor": "text", "bias": -3.0}),
    ("sigmoid", {"reduce": "mean"}, {"reduce": "mean"}),
    ("symile", {"candidates": "all", "logit_scale": 7.0, "reduce": "sum"}, {"logit_scale": 7.0, "reduce": "sum"}),
    ("pmrl", {"sign": "free"}, {"sign": "free"}),
    ("pmrl", {"anchor": "video", "orientation": 2.0}, {"anchor": "video", "orientation_weight": 2.0}),
    ("centrobind", {"normalize": True, "label_smoothing": 0.1}, {"normalize": True, "label_smoothing": 0.1}),
    ("centrobind", {"stop_gradient": True, "reduce": "mean"}, {"stop_gradient": True, "reduce": "mean"}),
    ("unialign", {"uniformity": "entropy", "kernel_width": 0.8}, {"uniformity_form": "entropy", "kernel_width": 0.8}),
    ("unialign", {"weights": {"volume": 0.1, "centroid": 0.0}}, {"weights": {"volume": 0.1, "centroid": 0.0}}),
    ("feature_separation", {"reduce": "mean", "uniformity_t": 1.0}, {"reduce": "mean", "uniformity_t": 1.0}),
    ("brownian_bridge", {"position": 0.6, "reduce": "mean"}, {"position": 0.6, "reduce": "mean"}),
    ("brownian_bridge", {"anchor": None}, {"anchor": None}),
    ("geometric_consistency", {"augmented": False, "normalizer": "pairs"}, {"augmented": False, "normalizer": "pairs"}),
    ("geometric_consistency", {"anchor": "text", "reduce": "mean"}, {"anchor": "text", "reduce": "mean"}),
]


def check(name: str, case: Any, options: dict[str, Any], reference: dict[str, Any], tiles: tuple[int, ...]) -> None:
    if name == "symile":
        options = {"candidates": "all", "learn_logit_scale": False, **options}
    if name in TEMPERED:
        options = {"temperature": 0.2, "learn_temperature": False, **options}
        reference = {"temperature": 0.2, **reference}
    if name == "sigmoid":
        options = {"learn_bias": False, **options}
    expected = REFERENCES[name](case, **reference)
    wanted = gradients(expected, case)
    for tile in tiles:
        loss = build_objective(name, tile=tile, **options)(case.embeddings()).loss
        assert loss.dtype == torch.float64
        assert abs(loss - expected).item() <= 1e-10 * max(1.0, abs(expected.item()))
        for one, other in zip(gradients(loss, case), wanted, strict=True):
            assert (one - other).abs().max().item() <= 1e-8


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("modalities", [2, 3, 4, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 16])
@pytest.mark.parametrize("ragged", [False, True])
def test_value_and_gradient_equal_the_formula(name: str, modalities: int, count: int, ragged: bool) -> None:
    if name == "symile" and count ** (modalities - 1) > 400:
        count = 5
    case = random_case(count, 8, min(modalities, MOST.get(name, 5)), masked=ragged, duplicates=ragged)
    check(name, case, {}, {}, (3, 1024))


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(("count", "dim"), [(33, 64), (16, 512)])
def test_value_and_gradient_equal_the_formula_of_larger_ones(name: str, count: int, dim: int) -> None:
    count = min(count, 8) if name == "symile" else count
    check(name, random_case(count, dim, masked=True, seed=5), {}, {}, (11, 1024))


@pytest.mark.parametrize(("name", "options", "reference"), VARIANTS)
def test_options_equal_the_formula(name: str, options: dict[str, Any], reference: dict[str, Any]) -> None:
    check(name, random_case(7, masked=True, duplicates=True, seed=2), options, reference, (4,))


@pytest.mark.parametrize("name", REFERENCES)
def test_gradient_equals_finite_differences(name: str) -> None:
    case = random_case(5, 6, masked=True)
    options = {"candidates": "shuffled"} if name == "symile" else {}
    objective = build_objective(name, tile=2, **options).double()
    generator = torch.Generator().manual_seed(1)
    leaves = [*case.leaves(), *objective.parameters()]
    directions = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
    loss = objective(case.embeddings()).loss
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    analytic = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True))
    values = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.add_(step * direction)
            values.append(float(objective(case.embeddings()).loss))
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.sub_(step * direction)
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(analytic, rel=1e-6, abs=1e-7)
