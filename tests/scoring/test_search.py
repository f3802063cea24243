"""The best candidates are the first of the sorted matrix, and the matrix is never there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from data_pipeline.settings import UserError
from pretrain.objectives.embeddings import Embeddings
from pretrain.retrieval import evaluate_retrieval
from pretrain.scoring import Matches, hardest_negatives, scores, search
from tests.scoring.references import DEVICES, SCORES, LargestTensor, random_side

AXES = torch.cat([torch.eye(6), -torch.eye(6)])


def tied_side(num: int, num_modalities: int, seed: int, missing: float = 0.1) -> dict[str, Tensor]:
    """Vectors along axes, so that many scores are equal to the last bit, in any tile."""
    random = torch.Generator().manual_seed(seed)
    side = {}
    for n in range(num_modalities):
        side[f"m{n}"] = AXES[torch.randint(0, len(AXES), (num,), generator=random)]
        side[f"m{n}"][torch.rand(num, generator=random) < missing] = torch.nan
    return side


def first_of(matrix: Tensor, top_k: int) -> Matches:
    """By sorting all: higher scores first, then lower indices; what has no score is no match."""
    values, order = matrix.sort(dim=1, descending=True, stable=True)
    order[values == -torch.inf] = -1
    return Matches(scores=values[:, :top_k], indices=order[:, :top_k])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)])
def test_ties_go_to_the_lower_index(score: str, sizes: tuple[int, int]) -> None:
    query, candidates = tied_side(11, sizes[0], seed=1), tied_side(23, sizes[1], seed=2)
    matrix = scores(query, candidates, score)
    ties = matrix[0].unique().numel()
    assert ties < 10, "the test must have ties"
    for tile in (1, 3, 5, 23, 100):
        for top_k in (1, 2, 7, 23, 99):
            found, expected = search(query, candidates, score, top_k=top_k, tile=tile), first_of(matrix, top_k)
            assert torch.equal(found.indices, expected.indices), (tile, top_k)
            assert torch.equal(found.scores, expected.scores), (tile, top_k)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score", SCORES)
def test_the_best_are_the_first_of_the_sorted_matrix(score: str, device: str) -> None:
    query, candidates = random_side(40, 2, seed=1, missing=0.2), random_side(57, 2, seed=2, missing=0.2)
    expected = first_of(scores(query, candidates, score), 5)
    for tile in (4, 16, 1000):
        found = search(query, candidates, score, top_k=5, tile=tile, device=torch.device(device))
        assert torch.equal(found.indices, expected.indices)
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-12, rtol=0)
        assert found.indices.device.type == "cpu"


def test_what_cannot_be_scored_is_no_match() -> None:
    query, candidates = random_side(3, 1, seed=1), random_side(4, 1, seed=2)
    query["m0"][1] = torch.nan
    candidates["m0"][:2] = 0
    found = search(query, candidates, "cosine", top_k=4, tile=1)
    assert found.indices[1].tolist() == [-1] * 4
    assert found.indices[0, 2:].tolist() == [-1, -1]
    assert sorted(found.indices[0, :2].tolist()) == [2, 3]
    assert (found.scores[found.indices == -1] == -torch.inf).all()
    spoilt = Embeddings(vectors={"m0": torch.tensor([[torch.nan, 1.0], [0.0, 1.0]])})
    found = search(Embeddings(vectors={"m0": torch.tensor([[0.0, 1.0]])}), spoilt, "cosine")
    assert found.indices.tolist() == [[1, -1]]


def test_empty_sides_and_mistakes() -> None:
    query = random_side(3, 1)
    assert search(query, random_side(0, 1), "cosine").indices.shape == (3, 0)
    assert search(random_side(0, 1), query, "cosine").indices.shape == (0, 3)
    with pytest.raises(UserError, match="top_k 0: expected at least 1"):
        search(query, query, "cosine", top_k=0)


def largest(num: int, what: str, score: str) -> int:
    """Elements of the largest tensor, with `num` samples of 8 dimensions on each side and tiles of 32."""
    side = random_side(num, 3, dim=8, seed=1, missing=0.1)
    one, others = {"m0": side["m0"]}, {"m1": side["m1"], "m2": side["m2"]}
    with LargestTensor() as seen:
        if what == "search":
            search(one, others, score, top_k=4, tile=32)
        elif what == "negatives":
            hardest_negatives(Embeddings(vectors=side), query="m0", score=score, top_k=4, tile=32)
        elif what == "evaluate":
            whole = {name: rows.nan_to_num(0.0) for name, rows in side.items()}
            evaluate_retrieval(whole, None, "m0", (score,), tile=32)
        else:
            scores(one, others, score, tile=32)
    return seen.num_elements


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("what", ["search", "negatives", "evaluate"])
def test_memory_does_not_grow_with_the_number_of_pairs(what: str, score: str) -> None:
    assert largest(200, "scores", score) == 200 * 200, "the counter must see the matrix where it is asked for"
    for num in (200, 400):
        assert largest(num, what, score) <= max(num * 8, 32 * 32 * 9), num
