"""What must not change a loss."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from pretrain.objectives import Embeddings, build_objective
from pretrain.objectives.pmrl import leading_direction
from tests.objectives.cases import keep, random_case
from tests.objectives.references import REFERENCES, Case
from tests.objectives.test_masks import fixed

ROTATED = [name for name in REFERENCES if name != "symile"]  # its product depends on the axes


def mapped(case: Case, function: Callable[[Tensor], Tensor]) -> Case:
    groups = ("vectors", "augmented", "independent", "independent_augmented")
    changed = {group: {name: function(t) for name, t in getattr(case, group).items()} for group in groups}
    return Case(present=case.present, ids=case.ids, **changed)


def rotation(dim: int, seed: int) -> Tensor:
    draws = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(draws)[0]


@pytest.mark.parametrize("name", REFERENCES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(7)))
def test_the_order_of_samples_changes_nothing(name: str, seed: int, order: list[int]) -> None:
    case = random_case(7, masked=True, duplicates=True, seed=seed)
    objective = fixed(name)
    expected = objective(case.embeddings()).loss
    assert abs(objective(keep(case, order).embeddings()).loss - expected).item() <= 1e-10


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(7)))
def test_the_order_of_samples_does_not_change_what_is_shuffled(seed: int, order: list[int]) -> None:
    case = random_case(7, masked=True, seed=seed)
    objective = build_objective("symile").double()
    expected = objective(case.embeddings()).loss
    assert abs(objective(keep(case, order).embeddings()).loss - expected).item() <= 1e-10


@pytest.mark.parametrize("name", ROTATED)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_common_rotation_changes_nothing(name: str, seed: int) -> None:
    case = random_case(6, masked=True, seed=seed)
    turn = rotation(8, seed)
    objective = fixed(name)
    expected = objective(case.embeddings()).loss
    assert abs(objective(mapped(case, lambda rows: rows @ turn).embeddings()).loss - expected).item() <= 1e-9


@pytest.mark.parametrize("name", REFERENCES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.permutations(["video", "audio", "depth"]))
def test_the_order_of_the_other_modalities_changes_nothing(name: str, seed: int, order: list[str]) -> None:
    names = ["text", *(order if name != "triangle" else [one for one in order if one != "depth"])]
    case = random_case(5, modalities=len(names), masked=True, seed=seed)
    view = case.embeddings()

    def ordered(embeddings: Embeddings) -> Embeddings:
        views = None if embeddings.views is None else {n: ordered(v) for n, v in embeddings.views.items()}
        vectors = {n: embeddings.vectors[n] for n in names}
        return Embeddings(vectors=vectors, present=embeddings.present, ids=embeddings.ids, views=views)

    options = {"anchor": "text"} if name == "unialign" else {}
    if name in ("infonce", "sigmoid", "feature_separation", "geometric_consistency"):
        options = {"anchor": "text"}
    objective = fixed(name, **options)
    assert abs(objective(ordered(view)).loss - objective(view).loss).item() <= 1e-10


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), modalities=st.integers(2, 5))
def test_the_leading_direction_does_not_depend_on_the_sign_of_singular_vectors(seed: int, modalities: int) -> None:
    """Whatever sign LAPACK returns: the direction follows the anchor, and -M has the opposite one."""
    case = random_case(6, modalities=modalities, seed=seed)
    matrices = torch.stack(list(case.vectors.values()), dim=1)
    there = torch.ones(6, modalities, dtype=torch.bool)
    values, leading = leading_direction(matrices, there)
    u, s, _ = torch.linalg.svd(matrices.transpose(1, 2), full_matrices=False)
    assert (values - s).abs().max().item() <= 1e-10
    assert ((leading * matrices[:, 0]).sum(dim=1) > 0).all()
    assert ((leading * u[:, :, 0]).sum(dim=1).abs() - 1).abs().max().item() <= 1e-9
    assert torch.allclose(leading_direction(-matrices, there)[1], -leading)


def test_volumes_do_not_see_the_sign_and_orientation_does() -> None:
    case = random_case(5, seed=1)
    flipped = Case(
        vectors={"text": case.vectors["text"], "video": -case.vectors["video"], "audio": case.vectors["audio"]},
        augmented=case.augmented, independent=case.independent, independent_augmented=case.independent_augmented,
        present=case.present, ids=case.ids,
    )  # fmt: skip

    def difference(orientation: float) -> float:
        objective = build_objective("gram", orientation=orientation).double()
        return abs(objective(case.embeddings()).loss - objective(flipped.embeddings()).loss).item()

    assert difference(0.0) <= 1e-12
    assert difference(1.0) > 1e-3


def test_orientation_pushes_negative_anchor_cosines_up() -> None:
    text = random_case(4, modalities=1).vectors["text"].detach()
    video = (-text).requires_grad_()
    embeddings = Embeddings(vectors={"text": text, "video": video})
    plain = build_objective("gram", learn_temperature=False)(embeddings).loss
    turned = build_objective("gram", learn_temperature=False, orientation=2.0)(embeddings).loss
    assert abs(turned - plain - 2.0).item() <= 1e-12  # the hinge on a cosine of -1
    direction = torch.autograd.grad(turned - plain, video)[0]
    assert torch.allclose(direction, -2.0 * text / 4)


def test_a_sum_of_modalities_is_a_side_of_a_pair() -> None:
    case = random_case(6)
    objective = build_objective("infonce", pairs=[("text", "video+audio")], learn_temperature=False)
    joint = torch.nn.functional.normalize(case.vectors["video"] + case.vectors["audio"], dim=1)
    logits = case.vectors["text"] @ joint.T / 0.07
    expected = sum(torch.nn.functional.cross_entropy(one, torch.arange(6)) for one in (logits, logits.T)) / 2
    assert abs(objective(case.embeddings()).loss - expected).item() <= 1e-12
