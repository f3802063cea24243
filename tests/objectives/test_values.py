"""Values and gradients of every objective against the float64 references, and finite differences."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.objectives import Objective, build_objective
from pretrain.objectives.terms import TupleCrossEntropy
from pretrain.tuples import _candidates
from tests.objectives.cases import MOST, gradients, random_case, scalar_gradients
from tests.objectives.references import REFERENCES, Case, divergence, symile

TEMPERED = ("gram", "triangle", "infonce", "sigmoid", "centrobind", "feature_separation")

MOST_TUPLES = 400
# Options of ours, and what the reference calls them where it differs.
VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("gram", {"label_smoothing": 0.0, "orientation": 0.5}, {"label_smoothing": 0.0, "orientation_weight": 0.5}),
    ("gram", {"anchor": "video"}, {"anchor": "video"}),
    ("infonce", {"pairs": [("audio", "text")]}, {"pairs": [("audio", "text")]}),
    ("infonce", {"pairs": [("text", "video+audio")]}, {"pairs": [("text", "video+audio")]}),
    ("sigmoid", {"pairs": [("video+audio", "text")]}, {"pairs": [("video+audio", "text")]}),
    ("pmrl", {"weights": {"values": 0.3, "contrast": 2.0}}, {"weights": {"values": 0.3, "contrast": 2.0}}),
    ("pmrl", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    (
        "pmrl",
        {"value_temperature": 0.5, "temperature": 0.4},
        {"value_temperature": 0.5, "temperature": 0.4},
    ),
    ("unialign", {"anchor": "text", "centroid_width": 0.9}, {"anchor": "text", "centroid_width": 0.9}),
    ("unialign", {"weights": {"uniformity": 0.5, "alignment": 3}}, {"weights": {"uniformity": 0.5, "alignment": 3}}),
    (
        "feature_separation",
        {"anchor": "text", "weights": {"orthogonal": 0.5, "contrast": 2.0, "uniformity": 0.25}},
        {"anchor": "text", "weights": {"orthogonal": 0.5, "contrast": 2.0, "uniformity": 0.25}},
    ),
    ("geometric_consistency", {"pairs": [("audio", "text")]}, {"pairs": [("audio", "text")]}),
    ("brownian_bridge", {"anchor": None, "pairs": [("audio", "text")]}, {"anchor": None, "pairs": [("audio", "text")]}),
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


def check(name: str, case: Case, options: dict[str, Any], reference: dict[str, Any], tiles: tuple[int, ...]) -> None:
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
        assert abs(loss - expected).item() <= 1e-10
        for one, other in zip(gradients(loss, case), wanted, strict=True):
            assert (one - other).abs().max().item() <= 1e-8


def sizes(counts: list[int]) -> list[tuple[str, int, int]]:
    """(objective, modalities, samples). Symile's reference multiplies out every tuple, so its sizes end earlier."""
    grid = itertools.product(REFERENCES, [2, 3, 4, 5], counts)
    return [
        (name, k, count)
        for name, k, count in grid
        if k <= MOST.get(name, 5) and (name != "symile" or count ** (k - 1) <= MOST_TUPLES)
    ]


@pytest.mark.parametrize(("name", "modalities", "count"), sizes([1, 2, 5, 7, 16]))
@pytest.mark.parametrize("ragged", [False, True])
def test_value_and_gradient_equal_the_formula(name: str, modalities: int, count: int, ragged: bool) -> None:
    case = random_case(count, 8, modalities, masked=ragged, duplicates=ragged)
    check(name, case, {}, {}, (3, 1024))


@pytest.mark.parametrize(("name", "dim"), [(n, d) for n in REFERENCES for d in (64, 512)])
def test_value_and_gradient_equal_the_formula_of_larger_ones(name: str, dim: int) -> None:
    count = 8 if name == "symile" else 16
    check(name, random_case(count, dim, masked=True, seed=5), {}, {}, (4, 5, 1024))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "modalities", "count"), sizes([1, 2, 7, 16, 33]))
def test_value_and_gradient_equal_the_formula_in_every_size(name: str, modalities: int, count: int) -> None:
    for dim in (8, 64, 512):
        check(name, random_case(count, dim, modalities, masked=True, seed=dim), {}, {}, (11, 1024))


def shuffled(case: Case) -> dict[str, list[list[int]]]:
    """The candidates of each modality's rows, as the product draws them."""
    objective = build_objective("symile").double()
    found = {}
    for term in objective.terms(case.embeddings(), objective.scalars()):
        assert isinstance(term, TupleCrossEntropy)
        known = {name: mask for name, mask in term.there.items() if mask.any()}
        found[term.name.removeprefix("symile/")] = _candidates(term, known, case.ids).tolist()
    return found


@pytest.mark.parametrize("modalities", [2, 3, 4])
@pytest.mark.parametrize("ragged", [False, True])
def test_symile_over_shuffled_tuples_equals_the_formula(modalities: int, ragged: bool) -> None:
    case = random_case(9, 8, modalities, masked=ragged, duplicates=ragged, seed=3)
    wanted = symile(case, candidates=shuffled(case))
    for tile in (2, 1024):
        loss = build_objective("symile", tile=tile, learn_logit_scale=False)(case.embeddings()).loss
        assert abs(loss - wanted).item() <= 1e-10
        for one, other in zip(gradients(loss, case), gradients(wanted, case, retain_graph=True), strict=True):
            assert (one - other).abs().max().item() <= 1e-8


def test_shuffled_tuples_mix_samples_and_are_others_in_another_batch() -> None:
    case = random_case(200, 4)
    others = random_case(200, 4)
    others.ids[199] = 10_000  # all but one sample are those of the first batch
    first, second = shuffled(case), shuffled(others)
    for name, tuples in first.items():
        columns = list(zip(*tuples, strict=True))
        assert all(sorted(column) == list(range(200)) for column in columns)  # each sample once in each modality
        assert sum(len(set(members)) == 1 for members in tuples) < 10  # one is expected by chance
        met, meets = ({tuple(members) for members in found[name]} for found in (first, second))
        assert len(met & meets) < 10
    apart = [abs(a - b) for a, b in first["text"]]
    assert sum(apart) / len(apart) > 40  # 67 for two independent orders


SCALARS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in TEMPERED),
    *((name, {"temperature_form": "divided"}) for name in TEMPERED),
    ("infonce", {"temperature_range": (0.1, 0.5)}),
    ("symile", {"candidates": "all"}),
    ("symile", {"candidates": "all", "logit_scale": 3.0}),
]


@pytest.mark.parametrize(("name", "options"), SCALARS)
def test_learned_scalars_have_the_gradient_of_the_formula(name: str, options: dict[str, Any]) -> None:
    case = random_case(6, masked=True, duplicates=True, seed=4)
    given = {"temperature": 0.2} if name in TEMPERED else {}
    objective = build_objective(name, **given, **options).double()
    learned = dict(objective.named_parameters())
    loss = objective(case.embeddings()).loss
    expected = REFERENCES[name](case, **of_scalars(objective, options))
    assert abs(loss - expected).item() <= 1e-7  # a scalar begins as a single precision number
    wanted = torch.autograd.grad(expected, list(learned.values()))
    assert len(wanted) == (2 if name == "sigmoid" else 1)
    for one, other in zip(scalar_gradients(loss, objective), wanted, strict=True):
        assert one.item() == pytest.approx(other.item(), rel=1e-8)
        assert abs(other.item()) > 1e-6


def of_scalars(objective: Objective, options: dict[str, Any]) -> dict[str, Tensor]:
    """What the reference takes, from the parameters by the formulas of docs/objectives.md."""
    learned = {name.rsplit(".", 1)[1]: value.squeeze() for name, value in objective.named_parameters()}
    found = {"bias": learned["bias"]} if "bias" in learned else {}
    if "log_logit_scale" in learned:
        return {"logit_scale" if "logit_scale" in options else "ratio": learned["log_logit_scale"].exp()}
    if options.get("temperature_form") == "divided":
        return found | {"temperature": learned["temperature"]}
    low, high = options.get("temperature_range", (0.001, 1.0) if objective.name == "sigmoid" else (0.01, 1.0))
    place = 1 / (1 + torch.exp(-learned["temperature"]))
    return found | {"temperature": torch.exp(math.log(low) + (math.log(high) - math.log(low)) * place)}


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_the_divergence_equals_the_formula(modalities: int, ragged: bool) -> None:
    case = random_case(9, modalities=modalities, masked=ragged, duplicates=ragged, seed=6)
    metrics = build_objective("unialign", divergence=True, tile=4).double()(case.embeddings()).metrics
    assert metrics["unialign/divergence"].item() == pytest.approx(divergence(case).item(), abs=1e-10)
    assert metrics["unialign/divergence"].item() > 0


def test_the_divergence_of_equal_modalities_is_zero() -> None:
    rows = random_case(9).vectors["text"].detach()
    case = random_case(9, vectors={name: rows.clone() for name in ("text", "video", "audio")})
    metrics = build_objective("unialign", divergence=True).double()(case.embeddings()).metrics
    assert abs(metrics["unialign/divergence"].item()) <= 1e-12


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
