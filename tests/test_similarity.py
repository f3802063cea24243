"""Scores of tuples of any size, complete or not, against determinants computed one by one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from data_pipeline.settings import UserError
from pretrain import retrieval
from pretrain.similarity import similarity


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def unit_rows(num: int, dim: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("num_others", [1, 2, 3])
def test_scores_are_those_of_the_retrieval_metrics(num_others: int) -> None:
    query = unit_rows(5, 8, 0)
    others = {f"m{n}": unit_rows(7, 8, n + 1) for n in range(num_others)}
    close(similarity({"q": query}, others, "volume"), retrieval.volume_scores(query, others))
    close(similarity({"q": query}, others, "cosine"), retrieval.summed_cosine_scores(query, others))
    if num_others == 1:
        close(similarity({"q": query}, others, "cosine"), retrieval.cosine_scores(query, others["m0"]))


@pytest.mark.parametrize(("num_query", "num_others"), list(itertools.product((1, 2, 3), (1, 2, 3))))
def test_volumes_of_any_tuple_are_gram_determinants_over_what_is_there(num_query: int, num_others: int) -> None:
    random = torch.Generator().manual_seed(num_query * 10 + num_others)
    query = {f"q{n}": unit_rows(6, 8, n) for n in range(num_query)}
    others = {f"c{n}": unit_rows(9, 8, 50 + n) for n in range(num_others)}
    for rows in (*query.values(), *others.values()):
        rows[torch.rand(len(rows), generator=random) < 0.3] = torch.nan
    volume, cosine = similarity(query, others, "volume"), similarity(query, others, "cosine")
    for i, j in itertools.product(range(6), range(9)):
        mine = [rows[i].double() for rows in query.values() if not rows[i].isnan().any()]
        theirs = [rows[j].double() for rows in others.values() if not rows[j].isnan().any()]
        if not mine or not theirs:
            assert volume[i, j] == cosine[i, j] == -torch.inf
            continue
        stacked = torch.stack([*mine, *theirs])
        close(volume[i, j], -torch.linalg.det(stacked @ stacked.T).clamp(min=0).sqrt())
        close(cosine[i, j], torch.stack([a @ b for a in mine for b in theirs]).sum())
    assert volume.isfinite().any(), "the test must compare something"


def test_a_missing_vector_is_never_an_advantage() -> None:
    query = unit_rows(4, 8, 0)
    whole = {"a": unit_rows(5, 8, 1), "b": unit_rows(5, 8, 2)}
    part = {"a": whole["a"], "b": torch.full_like(whole["b"], torch.nan)}
    assert (similarity({"q": query}, part, "volume") <= similarity({"q": query}, whole, "volume") + 1e-9).all()


def test_wrong_similarities_are_refused() -> None:
    rows = unit_rows(3, 12, 0)
    cases: list[tuple[dict[str, Tensor], dict[str, Tensor], str, str]] = [
        ({"a": rows}, {"b": rows}, "volum", "did you mean 'volume'"),
        ({}, {"b": rows}, "cosine", "query: no modality"),
        ({"a": rows[:, :2]}, {"b": rows[:, :2], "c": rows[:, :2]}, "volume", "3 vectors in 2 dimensions"),
    ]
    for query, candidates, score, message in cases:
        with pytest.raises(UserError, match=message):
            similarity(query, candidates, score)
