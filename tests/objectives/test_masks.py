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
from tests.objectives.cases import MOST, gradients, random_case
from tests.objectives.references import REFERENCES, Case

ALL = {"symile": {"candidates": "all"}}
SEEDS = st.integers(0, 10**6)
ANCHORS = {"gram": "text", "triangle": "text", "unialign": "video"}


def fixed(name: str, **options: Any) -> Objective:
    return build_objective(name, **ALL.get(name, {}), **options).double()


def keep(case: Case, rows: list[int]) -> Case:
    """The case with these samples alone, on the same leaves' values."""

    def cut(group: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[rows] for name, tensor in group.items()}

    return Case(
        vectors=cut(case.vectors), augmented=cut(case.augmented), independent=cut(case.independent),
        independent_augmented=cut(case.independent_augmented), present=cut(case.present), ids=case.ids[rows],
    )  # fmt: skip


def without(case: Case, modality: str) -> Case:
    """The case as if the modality did not exist."""

    def cut(group: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in group.items() if name != modality}

    return Case(
        vectors=cut(case.vectors), augmented=cut(case.augmented), independent=cut(case.independent),
        independent_augmented=cut(case.independent_augmented), present=cut(case.present), ids=case.ids,
    )  # fmt: skip


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("shuffled", [False, True])
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, value=st.sampled_from([torch.nan, torch.inf, 1e300, 0.0]))
def test_values_behind_a_mask_change_nothing(name: str, shuffled: bool, seed: int, value: float) -> None:
    objective = build_objective(name).double() if shuffled else fixed(name)
    clean = random_case(9, masked=True, seed=seed)
    spoiled = random_case(9, masked=True, seed=seed)
    for group in (spoiled.vectors, spoiled.augmented, spoiled.independent, spoiled.independent_augmented):
        for modality, tensor in group.items():
            with torch.no_grad():
                tensor[~spoiled.present[modality]] = value
    losses = [objective(case.embeddings()).loss for case in (clean, spoiled)]
    assert losses[0].item() == losses[1].item()
    for one, other in zip(gradients(losses[0], clean), gradients(losses[1], spoiled), strict=True):
        assert torch.equal(one, other)


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
        assert abs(loss - objective(without(case, "audio").embeddings()).loss).item() <= 1e-12
        assert torch.autograd.grad(loss, case.vectors["audio"], materialize_grads=True)[0].abs().max().item() == 0


@pytest.mark.parametrize("name", REFERENCES)
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, places=st.permutations(range(7)))
def test_samples_that_lack_what_is_needed_are_as_if_they_were_not_there(
    name: str, seed: int, places: list[int]
) -> None:
    case = random_case(7, seed=seed)
    one_left, nothing_left, without_anchor, *rows = places
    case.present["text"][one_left] = case.present["video"][one_left] = False
    for modality in case.names:
        case.present[modality][nothing_left] = False
    if name in ANCHORS:
        case.present[ANCHORS[name]][without_anchor] = False
    else:
        rows.append(without_anchor)
    rows.sort()
    for objective in (fixed(name), build_objective(name).double()):
        loss = objective(case.embeddings()).loss
        assert abs(loss - objective(keep(case, rows).embeddings()).loss).item() <= 1e-12


def test_a_sample_of_one_modality_counts_where_a_view_is_its_partner() -> None:
    """The contrast of a modality with its own augmentation needs no other modality."""
    case = random_case(5, modalities=2)
    case.present["text"][4] = False
    terms = build_objective("infonce", within=1.0).double()(case.embeddings()).metrics
    assert terms["num_samples/infonce/video-augmented"].item() == 5
    assert terms["num_samples/infonce/text-video"].item() == 4


@pytest.mark.parametrize("name", REFERENCES)
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_samples_of_one_id_are_not_negatives_of_each_other(name: str, seed: int) -> None:
    """Two samples, one item: what is left is what one sample gives, and no gradient pushes them apart."""
    both = random_case(2, seed=seed, duplicates=True)
    for group in (both.vectors, both.augmented, both.independent, both.independent_augmented):
        for tensor in group.values():
            with torch.no_grad():
                tensor[1] = tensor[0]
    for objective in (fixed(name), build_objective(name).double()):
        loss = objective(both.embeddings()).loss
        assert abs(loss - objective(keep(both, [0]).embeddings()).loss).item() <= 1e-12


def test_fewer_modalities_have_larger_volumes_and_it_is_reported() -> None:
    case = random_case(6, modalities=4, seed=2)
    case.present["audio"][3:] = False
    metrics = build_objective("gram").double()(case.embeddings()).metrics
    assert metrics["volume/3 modalities"] > metrics["volume/4 modalities"] > 0


@pytest.mark.parametrize("name", ["gram", "pmrl", "unialign"])
def test_more_modalities_than_dimensions_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"objective {name}: 3 modalities in 2 dimensions"):
        build_objective(name)(random_case(4, 2).embeddings())


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
    ],
)
def test_mistakes_are_one_line(name: str, options: dict[str, Any], nearest: str) -> None:
    with pytest.raises(UserError) as caught:
        build_objective(name, **options)
    assert nearest in str(caught.value)
    assert "\n" not in str(caught.value)
