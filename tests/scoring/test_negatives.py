"""Hard negatives against a loop over all pairs, in one process and over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.settings import UserError
from pretrain.collectives import World
from pretrain.objectives.embeddings import Embeddings
from pretrain.scoring import hardest_negatives
from tests.ranks import run_ranks
from tests.scoring.references import SCORES, reference, unit_rows

NUM = 12


def batch(num: int = NUM) -> Embeddings:
    """Samples that lack modalities, two of one item (0 and 5), and unnamed ones."""
    random = torch.Generator().manual_seed(0)
    vectors = {name: unit_rows(num, 8, seed) for seed, name in enumerate(("text", "video", "audio"))}
    present = {name: torch.rand(num, generator=random) < 0.75 for name in vectors}
    ids = torch.arange(num)
    ids[5] = 0
    ids[[7, 8]] = -1
    vectors["video"][~present["video"]] = torch.nan
    return Embeddings(vectors=vectors, present=present, ids=ids)


def expected(embeddings: Embeddings, query: str, candidates: str, score: str, top_k: int) -> list[list[int]]:
    """Candidates of each sample, one after the other, best first, -1 for none."""
    assert embeddings.present is not None
    assert embeddings.ids is not None
    sides = []
    for side in (query, candidates):
        sides.append({n: embeddings.vectors[n].clone() for n in side.split("+")})
        for name, rows in sides[-1].items():
            rows[~embeddings.present[name]] = torch.nan
    matrix, ids, found = reference(score, *sides), embeddings.ids.tolist(), []
    for i, row in enumerate(matrix.tolist()):
        others = [j for j in range(len(row)) if j != i and not (ids[i] == ids[j] != -1) and row[j] > -torch.inf]
        best = sorted(others, key=lambda j: -row[j])[:top_k]
        found.append(best + [-1] * (top_k - len(best)))
    return found


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("query", "candidates"), [("text", "video+audio"), ("video+audio", "text"), ("text", "audio")])
def test_negatives_are_those_of_a_loop(score: str, query: str, candidates: str) -> None:
    embeddings = batch()
    short = 0
    for top_k in (1, 4, NUM):
        found = hardest_negatives(embeddings, query=query, candidates=candidates, score=score, top_k=top_k, tile=5)
        assert found.indices.tolist() == expected(embeddings, query, candidates, score, top_k)
        assert ((found.indices == -1) == (found.scores == -torch.inf)).all()
        short += top_k < NUM and bool((found.indices == -1).any())  # of all, itself is never one
    assert short or query != "text", "the test must have samples without negatives enough"


def test_no_sample_is_its_own_negative() -> None:
    rows = unit_rows(1, 8, 0).repeat(6, 1)  # everything is the same: only what an item is tells them apart
    same = Embeddings(vectors={"text": rows, "video": rows}, ids=torch.tensor([3, 3, -1, -1, 4, 5]))
    found = hardest_negatives(same, query="text", score="cosine", top_k=6).indices.tolist()
    negatives = [{j for j in row if j != -1} for row in found]
    assert negatives[0] == negatives[1] == {2, 3, 4, 5}
    assert negatives[2] == {0, 1, 3, 4, 5}
    assert negatives[4] == {0, 1, 2, 3, 5}
    alone = Embeddings(vectors={"text": rows[:1], "video": rows[:1]})
    assert hardest_negatives(alone, query="text", score="volume").indices.tolist() == [[-1]]


def test_others_are_the_candidates_by_default() -> None:
    embeddings = batch()
    found = hardest_negatives(embeddings, query="text", score="volume", top_k=3)
    given = hardest_negatives(embeddings, query="text", candidates="video+audio", score="volume", top_k=3)
    assert torch.equal(found.indices, given.indices)
    with pytest.raises(UserError, match="query 'text\\+video\\+audio' is every modality"):
        hardest_negatives(embeddings, query="text+video+audio", score="volume")
    with pytest.raises(UserError, match="modality 'vidoe'; did you mean 'video'"):
        hardest_negatives(embeddings, query="text", candidates="vidoe", score="cosine")


def test_negatives_carry_no_gradient() -> None:
    vectors = {name: unit_rows(5, 8, seed).requires_grad_() for seed, name in enumerate(("text", "video"))}
    found = hardest_negatives(Embeddings(vectors=vectors), query="text", score="volume")
    assert not found.scores.requires_grad


def mine_on_a_rank(world: World, argument: Any) -> list[list[int]]:
    """Negatives of this rank's part of the batch."""
    whole, num = batch(), NUM // world.size
    mine = slice(world.rank * num, (world.rank + 1) * num)
    assert whole.present is not None
    assert whole.ids is not None
    local = Embeddings(
        vectors={name: rows[mine] for name, rows in whole.vectors.items()},
        present={name: rows[mine] for name, rows in whole.present.items()},
        ids=whole.ids[mine],
    )
    rows: Tensor = hardest_negatives(local, query="text", score="volume", top_k=4, world=world).indices
    return rows.tolist()


def test_ranks_find_the_negatives_of_the_global_batch(tmp_path: Path) -> None:
    whole = hardest_negatives(batch(), query="text", score="volume", top_k=4).indices.tolist()
    found = run_ranks("tests.scoring.test_negatives:mine_on_a_rank", 2, tmp_path)
    assert [row for part in found for row in part] == whole
