"""Scores of tuples of any size, complete or not, against one decomposition a pair."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from data_pipeline.settings import UserError
from pretrain.objectives.embeddings import Embeddings
from pretrain.scoring import scores
from tests.scoring.references import DEVICES, SCORES, random_side, reference, unit_rows

SIZES = list(itertools.product((1, 2, 3), (1, 2, 3)))


def close(found: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found.cpu(), expected.double(), atol=atol, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("num_query", "num_candidate"), SIZES)
def test_scores_of_any_tuple_are_their_definition(score: str, num_query: int, num_candidate: int, device: str) -> None:
    query = random_side(6, num_query, seed=1, missing=0.3)
    candidates = random_side(9, num_candidate, seed=2, missing=0.3)
    expected = reference(score, query, candidates)
    assert expected.isfinite().any()
    found = scores(query, candidates, score, device=torch.device(device), tile=4)
    assert (found.dtype, found.device.type) == (torch.float64, "cpu")
    close(found, expected)


def test_a_cosine_is_of_one_vector_with_one() -> None:
    query, candidates = random_side(6, 1, seed=1), random_side(9, 1, seed=2)
    for score in ("cosine", "summed_cosine", "centroid"):
        close(scores(query, candidates, score), reference("cosine", query, candidates), 1e-14)
    with pytest.raises(UserError, match="1 and 2 modalities; expected one a side, or summed_cosine"):
        scores(query, random_side(9, 2), "cosine")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("tile", [1, 3, 7, 10, 1000])
def test_tiles_change_nothing(score: str, tile: int) -> None:
    query, candidates = random_side(9, 2, seed=1, missing=0.2), random_side(10, 2, seed=2, missing=0.2)
    close(scores(query, candidates, score, tile=tile), scores(query, candidates, score), 1e-14)


@pytest.mark.parametrize("score", SCORES)
def test_blocks_of_small_matrices_change_nothing(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, candidates = random_side(9, 2, seed=1), random_side(10, 3, seed=2)
    whole = scores(query, candidates, score)
    monkeypatch.setattr("pretrain.scoring.score.BLOCK_ELEMENTS", 200)
    close(scores(query, candidates, score), whole, 1e-14)


@pytest.mark.parametrize("score", SCORES)
def test_neither_the_order_of_modalities_nor_the_side_matters(score: str) -> None:
    query, candidates = random_side(5, 2, seed=1, missing=0.2), random_side(6, 3, seed=2, missing=0.2)
    found = scores(query, candidates, score)
    close(scores(query, dict(reversed(candidates.items())), score), found, 1e-13)
    close(scores(candidates, query, score).T, found, 1e-13)
    close(scores({n: 2 * r for n, r in query.items()}, candidates, score), found, 1e-13)  # lengths do not count


# What is missing


@pytest.mark.parametrize("score", SCORES)
def test_masks_nan_and_zeros_say_the_same(score: str) -> None:
    query, candidates = random_side(5, 2, seed=1, missing=0.4), random_side(6, 2, seed=2, missing=0.4)
    expected = scores(query, candidates, score)
    zeros = {name: rows.nan_to_num(0.0) for name, rows in candidates.items()}
    assert torch.equal(scores(query, zeros, score), expected)
    for garbage in (torch.nan, torch.inf, 7.0):
        present = {name: ~rows.isnan().any(dim=1) for name, rows in candidates.items()}
        spoilt = {name: torch.where(present[name][:, None], rows, garbage) for name, rows in candidates.items()}
        assert torch.equal(scores(query, Embeddings(vectors=spoilt, present=present), score), expected)


@pytest.mark.parametrize("score", SCORES)
def test_a_modality_that_nobody_has_is_not_there(score: str) -> None:
    query, candidates = random_side(5, 1, seed=1), random_side(6, 2, seed=2)
    absent = candidates | {"absent": torch.full((6, 8), torch.nan)}
    close(scores(query, absent, score), scores(query, candidates, score), 1e-14)


@pytest.mark.parametrize("score", ["volume", "singular_value"])
def test_a_missing_vector_is_never_an_advantage(score: str) -> None:
    query, whole = random_side(4, 1, seed=1), random_side(5, 3, seed=2)
    part = whole | {"m1": torch.full((5, 8), torch.nan)}
    assert (scores(query, part, score) <= scores(query, whole, score) + 1e-12).all()
    assert (scores(query, part, score) < scores(query, whole, score) - 1e-3).any()


@pytest.mark.parametrize("score", SCORES)
def test_nan_that_is_not_masked_is_not_missing(score: str) -> None:
    query, candidates = random_side(3, 1, seed=1), random_side(4, 2, seed=2)
    candidates["m1"][2, 5] = torch.nan
    found = scores(Embeddings(vectors=query), Embeddings(vectors=candidates), score)
    assert found.isnan().nonzero()[:, 1].unique().tolist() == [2]
    whole = random_side(4, 2, seed=2)
    close(found[:, [0, 1, 3]], scores(query, whole, score)[:, [0, 1, 3]], 1e-14)


# By hand


@pytest.mark.parametrize(
    ("score", "same", "opposite", "orthogonal"),
    [
        ("cosine", 1.0, -1.0, 0.0),
        ("summed_cosine", 1.0, -1.0, 0.0),
        ("centroid", 1.0, -1.0, 0.0),
        ("volume", 0.0, 0.0, -1.0),
        ("singular_value", math.sqrt(2), math.sqrt(2), 1.0),
    ],
)
def test_two_vectors_by_hand(score: str, same: float, opposite: float, orthogonal: float) -> None:
    candidates = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 5.0]])
    found = scores({"a": torch.tensor([[1.0, 0.0]])}, {"b": candidates}, score)
    close(found, torch.tensor([[same, opposite, orthogonal]], dtype=torch.float64), 1e-15)


def test_vectors_that_cancel_have_a_centroid_like_no_other() -> None:
    row = unit_rows(1, 8, 0)
    assert scores({"q": row}, {"a": row, "b": -row}, "centroid").item() == 0.0
    assert scores({"q": row}, {"a": row, "b": row}, "centroid").item() == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("num_others", [1, 2])
def test_small_volumes_have_no_floor(num_others: int) -> None:
    angle = 1e-6  # cos(angle) differs from 1 by 5e-13: float32 would say 0
    query = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]], dtype=torch.float64)
    others = {"a": torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)}
    if num_others == 2:
        others["b"] = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    assert scores({"q": query}, others, "volume").item() == pytest.approx(-angle, rel=1e-3)
    assert scores({"q": others["a"]}, others, "volume").item() == 0.0


def test_dependent_vectors_have_volume_zero() -> None:
    rows = unit_rows(4, 8, 0)
    assert (scores({"q": unit_rows(3, 8, 1)}, {"a": rows, "b": rows, "c": -rows}, "volume") == 0).all()


def test_float32_is_near() -> None:
    query, candidates = random_side(20, 1, dim=64, seed=1), random_side(30, 2, dim=64, seed=2)
    for score in SCORES:
        found = scores(query, candidates, score, dtype=torch.float32)
        assert found.dtype == torch.float32
        assert (found.double() - scores(query, candidates, score)).abs().max() < 1e-5


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("num_queries", "num_candidates"), [(0, 3), (3, 0), (0, 0)])
def test_an_empty_side_has_no_scores(score: str, num_queries: int, num_candidates: int) -> None:
    found = scores(random_side(num_queries, 2), random_side(num_candidates, 2), score)
    assert found.shape == (num_queries, num_candidates)


def test_mistakes_are_said() -> None:
    rows = unit_rows(3, 12, 0)
    cases: list[tuple[dict[str, Tensor], dict[str, Tensor], str, str]] = [
        ({"a": rows}, {"b": rows}, "volum", "score 'volum': unknown; did you mean 'volume'"),
        ({}, {"b": rows}, "cosine", "query: no modality"),
        ({"a": rows}, {"b": rows, "c": rows[:2]}, "centroid", "candidates: shapes .* the same for every modality"),
        ({"a": rows}, {"b": rows[:, :4]}, "centroid", "query rows have 12 dimensions, candidates 4"),
        ({"a": rows[:, :2]}, {"b": rows[:, :2], "c": rows[:, :2]}, "volume", "3 vectors in 2 dimensions"),
    ]
    for query, candidates, score, message in cases:
        with pytest.raises(UserError, match=message):
            scores(query, candidates, score)
    with pytest.raises(UserError, match="tile 0"):
        scores({"a": rows}, {"b": rows}, "volume", tile=0)
