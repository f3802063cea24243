"""What missing modalities and repeated samples mean: one meaning for every objective."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from data_pipeline.settings import UserError
from pretrain.objectives import Objective, build_objective
from tests.objectives.cases import MOST, OPTIONS, gradients, keep, random_case, scalar_gradients
from tests.objectives.references import REFERENCES, Case

ALL = {"symile": {"candidates": "all"}}
SEEDS = st.integers(0, 10**6)
# (name, options, the anchor without which a sample is dropped)
ANCHORED: list[tuple[str, dict[str, Any], str | None]] = [
    *((name, {}, {"gram": "text", "triangle": "text", "unialign": "video"}.get(name)) for name in REFERENCES),
    ("brownian_bridge", {"anchor": "text"}, "text"),
    *(
        (name, {"anchor": "text"}, "text")
        for name in ("infonce", "sigmoid", "feature_separation", "geometric_consistency")
    ),
    ("infonce", {"anchor": "text", "within": 0.5}, "text"),
]


def fixed(name: str, **options: Any) -> Objective:
    return build_objective(name, **ALL.get(name, {}), **options).double()


def without(case: Case, modality: str) -> Case:
    """The case as if the modality did not exist."""

    def cut(group: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in group.items() if name != modality}

    return Case(
        vectors=cut(case.vectors), augmented=cut(case.augmented), independent=cut(case.independent),
        independent_augmented=cut(case.independent_augmented), present=cut(case.present), ids=case.ids,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "options"), [(name, o) for name in REFERENCES for o in OPTIONS.get(name, [{}])])
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, value=st.sampled_from([torch.nan, torch.inf, 1e300, 0.0]))
def test_values_behind_a_mask_change_nothing(name: str, options: dict[str, Any], seed: int, value: float) -> None:
    objective = build_objective(name, **options).double()
    clean = random_case(9, masked=True, seed=seed)
    spoiled = random_case(9, masked=True, seed=seed)
    for group in (spoiled.vectors, spoiled.augmented, spoiled.independent, spoiled.independent_augmented):
        for modality, tensor in group.items():
            with torch.no_grad():
                tensor[~spoiled.present[modality]] = value
    losses = [objective(case.embeddings()).loss for case in (clean, spoiled)]
    assert losses[0].item() == losses[1].item()
    found = [
        [*gradients(loss, case, retain_graph=True), *scalar_gradients(loss, objective)]
        for loss, case in zip(losses, (clean, spoiled), strict=True)
    ]
    assert len(found[0]) == 12 + len(list(objective.parameters()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", REFERENCES)
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_a_row_of_zeros_is_a_missing_one(name: str, seed: int) -> None:
    masked, zeros = (random_case(7, masked=True, seed=seed) for _ in range(2))
    for group in (zeros.vectors, zeros.augmented, zeros.independent, zeros.independent_augmented):
        for modality, rows in group.items():
            with torch.no_grad():
                rows[~zeros.present[modality]] = 0
    for mask in zeros.present.values():
        mask[:] = True
    objective = build_objective(name).double()
    assert objective(zeros.embeddings()).loss.item() == objective(masked.embeddings()).loss.item()


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_a_modality_missing_everywhere_is_the_objective_of_the_others(name: str, reduce: str, seed: int) -> None:
    options = {"reduce": reduce} if "reduce" in type(build_objective(name).options).model_fields else {}
    modalities = min(4, MOST.get(name, 4))
    full = random_case(6, modalities=modalities, masked=True, seed=seed)
    case = replace(full, present={n: mask & (n != "audio") for n, mask in full.present.items()})
    for objective in (fixed(name, **options), build_objective(name, **options).double()):
        loss = objective(case.embeddings()).loss
        others = without(case, "audio")
        of_others = objective(others.embeddings()).loss
        assert abs(loss - of_others).item() <= 1e-12
        assert torch.autograd.grad(
            loss, case.vectors["audio"], materialize_grads=True, retain_graph=True
        )[0].abs().max().item() == 0  # fmt: skip
        rest = [tensor for tensor in others.leaves() if tensor.requires_grad]  # the same tensors as the case's
        grads = [torch.autograd.grad(value, rest, materialize_grads=True) for value in (loss, of_others)]
        assert len(rest) == 4 * (modalities - 1)
        for one, other in zip(*grads, strict=True):
            assert (one - other).abs().max().item() <= 1e-12


@pytest.mark.parametrize(("name", "options", "anchor"), ANCHORED)
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, places=st.permutations(range(7)))
def test_samples_that_lack_what_is_needed_are_as_if_they_were_not_there(
    name: str, options: dict[str, Any], anchor: str | None, seed: int, places: list[int]
) -> None:
    case = random_case(7, seed=seed)
    one_left, nothing_left, without_anchor, *rows = places
    case.present["text"][one_left] = case.present["video"][one_left] = False
    for modality in case.names:
        case.present[modality][nothing_left] = False
    if anchor is not None:
        case.present[anchor][without_anchor] = False
    else:
        rows.append(without_anchor)
    rows.sort()
    for objective in (fixed(name, **options), build_objective(name, **options).double()):
        loss = objective(case.embeddings()).loss
        assert abs(loss - objective(keep(case, rows).embeddings()).loss).item() <= 1e-12


@pytest.mark.parametrize("name", REFERENCES)
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_samples_of_one_id_are_not_negatives_of_each_other(name: str, seed: int) -> None:
    """Two samples that differ, one item: the mean of what each gives alone, in value and gradient."""
    both = random_case(2, seed=seed, duplicates=True)
    for objective in (fixed(name), build_objective(name).double()):
        loss = objective(both.embeddings()).loss
        alone = sum(objective(keep(both, [i]).embeddings()).loss for i in (0, 1)) / 2
        assert abs(loss - alone).item() <= 1e-12
        for one, other in zip(gradients(loss, both), gradients(alone, both), strict=True):
            assert (one - other).abs().max().item() <= 1e-12


def test_fewer_modalities_have_larger_volumes_and_it_is_reported() -> None:
    case = random_case(6, modalities=4, seed=2)
    case.present["audio"][3:] = False
    metrics = build_objective("gram").double()(case.embeddings()).metrics
    assert metrics["volume/3 modalities"] > metrics["volume/4 modalities"] > 0


@pytest.mark.parametrize("name", ["gram", "pmrl", "unialign"])
@pytest.mark.parametrize("modalities", [2, 3, 5])
def test_more_modalities_than_dimensions_are_refused(name: str, modalities: int) -> None:
    with pytest.raises(UserError, match=f"objective {name}: {modalities} modalities in {modalities - 1} dimensions"):
        build_objective(name)(random_case(4, modalities - 1, modalities).embeddings())


@pytest.mark.parametrize(("name", "quantity"), [("triangle", "area"), ("unialign", "squared_volume")])
def test_what_depends_on_arity_is_reported_by_arity(name: str, quantity: str) -> None:
    case = random_case(6, seed=2)
    case.present["audio"][3:] = False
    metrics = build_objective(name).double()(case.embeddings()).metrics
    halves = [build_objective(name).double()(keep(case, rows).embeddings()).metrics for rows in ([0, 1, 2], [3, 4, 5])]
    for arity, half in ((3, halves[0]), (2, halves[1])):
        label = f"{quantity}/{arity} modalities"
        assert metrics[label].item() == pytest.approx(half[label].item(), abs=1e-12)
        assert f"{quantity}/{5 - arity} modalities" not in half


def test_too_many_tuples_are_refused_with_a_way_out() -> None:
    with pytest.raises(UserError, match=r"36 tuples .* at most max_tuples = 35: use candidates: shuffled"):
        build_objective("symile", candidates="all", max_tuples=35)(random_case(6).embeddings())


def test_a_fourth_corner_of_a_triangle_is_refused() -> None:
    with pytest.raises(UserError, match="4 modalities; expected 3"):
        build_objective("triangle", modalities=("text", "video", "audio", "depth"))


@pytest.mark.parametrize("name", ["feature_separation", "brownian_bridge", "geometric_consistency"])
def test_a_view_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"objective {name}: it needs the (augmented|independent) view"):
        build_objective(name)(replace(random_case(4).embeddings(), views=None))


@pytest.mark.parametrize(
    ("name", "options", "nearest"),
    [
        ("gramm", {}, "did you mean 'gram'?"),
        ("gram", {"temprature": 0.1}, "did you mean 'temperature'?"),
        ("gram", {"temperature": 2.0}, "temperature 2.0 is not inside"),
        ("infonce", {"anchor": "txt", "modalities": ("text", "video")}, "did you mean 'text'?"),
        ("pmrl", {"anchor": "txt", "modalities": ("text", "video")}, "did you mean 'text'?"),
        ("unialign", {"anchor": "vido", "modalities": ("text", "video")}, "did you mean 'video'?"),
        ("unialign", {"weights": {"aligment": 1.0}}, "did you mean 'alignment'?"),
        ("geometric_consistency", {"pairs": [("text", "vid")], "modalities": ("text", "video")}, "did you mean"),
        ("infonce", {"pairs": []}, "pairs: none"),
        ("infonce", {"pairs": [("text", "text+video")]}, "names a modality twice"),
        ("sigmoid", {"pairs": [("text", "video"), ("video", "text")]}, "one is there twice"),
        ("infonce", {"pairs": [("video+audio", "text"), ("audio+video", "text")]}, "one is there twice"),
        ("infonce", {"pairs": [("text", "video")], "anchor": "text"}, "not both"),
        ("unialign", {"weights": dict.fromkeys(("uniformity", "alignment", "volume", "centroid"), 0)}, "weight is 0"),
        ("gram", {"weight": float("nan")}, "finite"),
        ("gram", {"temperature_range": (0.001, float("inf"))}, "finite"),
    ],
)
def test_mistakes_are_one_line(name: str, options: dict[str, Any], nearest: str) -> None:
    with pytest.raises(UserError) as caught:
        build_objective(name, **options)
    assert nearest in str(caught.value)
    assert "\n" not in str(caught.value)
