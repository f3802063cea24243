"""Every kind of term against float64 references written from its formula: masks, duplicates, tiles, ranks, sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.collectives import World
from pretrain.objectives.terms import CrossEntropy, LogMeanExp, Pairs, PairSum, PerSample, SigmoidCrossEntropy, Term
from pretrain.pairwise import evaluate_terms
from tests.ranks import run_ranks

DIM = 5
Inputs = dict[str, Tensor]


def inputs(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    """Vectors of two sides [count, DIM], a factor a column [count], a scale and a bias [1]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"left": (count, DIM), "right": (count, DIM), "factor": (count,), "scale": (1,), "bias": (1,)}
    values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


def score(rows: Inputs, columns: Inputs, scalars: Inputs) -> Tensor:
    return rows["left"] @ columns["right"].T * columns["factor"] * scalars["scale"] + scalars["bias"]


def kernel(rows: Inputs, columns: Inputs, scalars: Inputs) -> Tensor:
    """-scale^2 |x - y|^2, the same tensor as rows and as columns."""
    x, y = rows["x"], columns["x"]
    squared = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T
    return -squared * scalars["scale"].square()


def pairs_of(values: Inputs, valid: Tensor, ids: Tensor, tile: int, precise: bool = False) -> Pairs:
    left, right, factor = (
        torch.where(valid.view(-1, *[1] * (values[name].ndim - 1)), values[name], 0.0)
        for name in ("left", "right", "factor")
    )
    matched = (left * right).sum(1) * factor * values["scale"] + values["bias"]
    return Pairs(
        rows={"left": values["left"]},
        columns={"right": values["right"], "factor": values["factor"]},
        scalars={"scale": values["scale"], "bias": values["bias"]},
        score=score,
        valid=valid,
        ids=ids,
        tile=tile,
        matched=matched if precise else None,
    )


def kernel_pairs(values: Inputs, side: str, valid: Tensor, ids: Tensor, tile: int) -> Pairs:
    rows = {"x": values[side]}
    return Pairs(
        rows=rows, columns=rows, scalars={"scale": values["scale"]}, score=kernel, valid=valid, ids=ids, tile=tile
    )


Masks = tuple[Tensor, Tensor]  # of most pairs; of the second pairs of a term that has two
Make = Callable[[Inputs, Masks, Tensor, int], Term]
MAKERS: dict[str, Make] = {
    "softmax": lambda v, m, i, t: CrossEntropy(name="t", weight=1.0, pairs=pairs_of(v, m[0], i, t)),
    "softmax, smoothed, precise": lambda v, m, i, t: CrossEntropy(
        name="t", weight=1.0, pairs=pairs_of(v, m[0], i, t, precise=True), label_smoothing=0.1
    ),
    "softmax of rows": lambda v, m, i, t: CrossEntropy(
        name="t", weight=1.0, pairs=pairs_of(v, m[0], i, t), label_smoothing=0.2, row_weight=1.0, column_weight=0.0
    ),
    "softmax of columns": lambda v, m, i, t: CrossEntropy(
        name="t", weight=1.0, pairs=pairs_of(v, m[0], i, t, precise=True), row_weight=0.0, column_weight=2.0
    ),
    "sigmoid": lambda v, m, i, t: SigmoidCrossEntropy(name="t", weight=1.0, pairs=pairs_of(v, m[0], i, t)),
    "sum / samples": lambda v, m, i, t: PairSum(name="t", weight=1.0, pairs=pairs_of(v, m[0], i, t, precise=True)),
    "sum of others / pairs": lambda v, m, i, t: PairSum(
        name="t", weight=1.0, pairs=pairs_of(v, m[0], i, t), normalizer="pairs", matched=False
    ),
    "log mean over pairs": lambda v, m, i, t: LogMeanExp(
        name="t", weight=1.0, pairs=(kernel_pairs(v, "left", m[0], i, t),)
    ),
    "log mean over others": lambda v, m, i, t: LogMeanExp(
        name="t", weight=1.0, pairs=(pairs_of(v, m[0], i, t),), matched=False
    ),
    "log mean over rows": lambda v, m, i, t: LogMeanExp(
        name="t", weight=1.0, pairs=(pairs_of(v, m[0], i, t, precise=True),), over="rows"
    ),
    "log mean over rows of others": lambda v, m, i, t: LogMeanExp(
        name="t", weight=1.0, pairs=(pairs_of(v, m[0], i, t),), over="rows", matched=False
    ),
    "joint log, 1 / samples": lambda v, m, i, t: LogMeanExp(
        name="t",
        weight=1.0,
        pairs=(kernel_pairs(v, "left", m[0], i, t), kernel_pairs(v, "right", m[1], i, t)),
        normalizer="samples",
    ),
    "joint log of rows": lambda v, m, i, t: LogMeanExp(
        name="t",
        weight=1.0,
        pairs=(kernel_pairs(v, "left", m[0], i, t), kernel_pairs(v, "right", m[1], i, t)),
        over="rows",
    ),
}


def counted_pairs(pairs: Pairs) -> tuple[list[int], dict[int, list[int]]]:
    """Valid samples, and for each of them the others it is paired with."""
    valid = [i for i, flag in enumerate(pairs.valid.tolist()) if flag]
    ids = pairs.ids.tolist()
    return valid, {i: [j for j in valid if j != i and (ids[i] == -1 or ids[i] != ids[j])] for i in valid}


def whole_scores(pairs: Pairs) -> Tensor:
    """All scores [n, n] with the matched ones on the diagonal."""
    scores = pairs.score(pairs.rows, pairs.columns, pairs.scalars)
    if pairs.matched is None:
        return scores
    return scores - scores.diag().diag() + pairs.matched.diag()


def reference(term: Term) -> Tensor:
    """The value of a term, pair by pair, as its docstring states it."""
    if isinstance(term, PerSample):
        return term.values[term.valid].mean()
    if isinstance(term, LogMeanExp):
        return reference_log_mean(term)
    scores, (valid, others) = whole_scores(term.pairs), counted_pairs(term.pairs)
    total = scores.new_zeros(())
    if isinstance(term, CrossEntropy):
        for matrix, weight in ((scores, term.row_weight), (scores.T, term.column_weight)):
            for i in valid:
                row = matrix[i, [i, *others[i]]]
                loss = row.logsumexp(0) - (1 - term.label_smoothing) * row[0] - term.label_smoothing * row.mean()
                total = total + weight * loss
    elif isinstance(term, SigmoidCrossEntropy):
        for i in valid:
            total = total - torch.nn.functional.logsigmoid(scores[i, i])
            total = total - torch.nn.functional.logsigmoid(-scores[i, others[i]]).sum()
    else:
        kept = {i: [*others[i], *([i] if term.matched else [])] for i in valid}
        total = total + sum(scores[i, kept[i]].sum() for i in valid)
        if term.normalizer == "pairs":
            return total / max(sum(len(columns) for columns in kept.values()), 1)
    return total / max(len(valid), 1)


def reference_log_mean(term: LogMeanExp) -> Tensor:
    rows: dict[int, list[Tensor]] = {}
    total, zero = [], term.pairs[0].valid.new_zeros((), dtype=torch.float64)
    for pairs in term.pairs:
        scores, (valid, others) = whole_scores(pairs), counted_pairs(pairs)
        kept = {i: [*others[i], *([i] if term.matched else [])] for i in valid}
        num_pairs = sum(len(columns) for columns in kept.values())
        for i in valid:
            if kept[i]:
                of_row = scores[i, kept[i]].exp().sum()
                norm = len(valid) if term.normalizer == "samples" else len(kept[i])
                rows.setdefault(i, []).append(of_row / norm)
                total.append(of_row / (len(valid) if term.normalizer == "samples" else num_pairs))
    if not total:
        return zero
    if term.over == "pairs":
        return torch.stack(total).sum().log()
    return torch.stack([torch.stack(parts).sum().log() for parts in rows.values()]).mean()


def some_valid(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) > 0.3


def everyone(count: int) -> Masks:
    return torch.ones(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)


CASES: dict[str, Callable[[int], tuple[Masks, Tensor]]] = {
    "all": lambda n: (everyone(n), torch.full((n,), -1)),
    "ragged, duplicates": lambda n: (
        (some_valid(n, 0), some_valid(n, 1)),
        torch.where(torch.arange(n) % 5 == 0, -1, torch.arange(n) // 3),
    ),
    "one": lambda n: ((torch.arange(n) == n // 2, torch.arange(n) == 0), torch.arange(n)),
    "one item": lambda n: (everyone(n), torch.full((n,), 7)),
    "none": lambda n: ((~everyone(n)[0], ~everyone(n)[0]), torch.arange(n)),
}


def gradients(value: Tensor, values: Inputs) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in values.values()]
    return list(torch.autograd.grad(value, list(values.values()), materialize_grads=True))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_equal_the_formula(kind: str, case: str) -> None:
    for count in (1, 2, 7, 16, 33):
        values, (masks, ids) = inputs(count, seed=count), CASES[case](count)
        expected = reference(MAKERS[kind](values, masks, ids, count))
        wanted = gradients(expected, values)
        for tile in (1, 3, 8, 64) if count < 33 else (8, 11, 33):
            result = evaluate_terms([MAKERS[kind](values, masks, ids, tile)])
            assert abs(result.metrics["loss"] - expected).item() <= 1e-10, (count, tile)
            for name, one, other in zip(values, gradients(result.local_loss, values), wanted, strict=True):
                assert torch.isfinite(one).all(), (count, tile, name)
                assert (one - other).abs().max().item() <= 1e-8, (count, tile, name)


@pytest.mark.parametrize("kind", MAKERS)
def test_gradient_equals_finite_differences(kind: str) -> None:
    values = inputs(6, seed=1)
    masks = torch.arange(6) != 2, torch.arange(6) != 4
    ids = torch.tensor([0, 1, 2, 0, -1, -1])

    def value(*leaves: Tensor) -> Tensor:
        return evaluate_terms([MAKERS[kind](dict(zip(values, leaves, strict=True)), masks, ids, 4)]).local_loss

    assert torch.autograd.gradcheck(value, tuple(values.values()), atol=1e-7)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf])
def test_nothing_behind_a_mask_has_an_effect(kind: str, spoiled: float) -> None:
    clean, valid = inputs(9, seed=2), torch.ones(9, dtype=torch.bool)
    valid[[0, 4, 5]] = False
    broken = {name: value.detach().clone() for name, value in clean.items()}
    for name in ("left", "right", "factor"):
        broken[name][~valid] = spoiled
    found = []
    for values in (clean, {name: value.requires_grad_() for name, value in broken.items()}):
        result = evaluate_terms([MAKERS[kind](values, (valid, valid), torch.arange(9), 4)])
        found.append((result.metrics["loss"], gradients(result.local_loss, values)))
    assert torch.isfinite(found[0][0])
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_softmax_of_large_scores_is_as_precise_as_the_scores(dtype: torch.dtype, size: float) -> None:
    """Scores of 1e4 that differ by little: their common part must not eat the digits of the difference."""
    count = 16
    generator = torch.Generator().manual_seed(4)
    whole = (size + torch.randn(count, count, generator=generator, dtype=torch.float64) * 2).to(dtype)
    rows = whole.clone().requires_grad_()

    def term(scores: Tensor, tile: int) -> Term:
        columns = {"index": torch.arange(count)}
        pairs = Pairs(
            rows={"scores": scores},
            columns=columns,
            scalars={},
            score=lambda rows, columns, _: rows["scores"][:, columns["index"]],
            valid=torch.ones(count, dtype=torch.bool),
            ids=torch.arange(count) // 2,
            tile=tile,
        )
        return CrossEntropy(name="t", weight=1.0, pairs=pairs, label_smoothing=0.1)

    exact = (whole.double() - size).requires_grad_()  # the loss does not depend on a common part
    expected = reference(term(exact, count))
    wanted = torch.autograd.grad(expected, exact)[0]
    for tile in (5, 16):
        result = evaluate_terms([term(rows, tile)])
        found = torch.autograd.grad(result.local_loss, rows)[0]
        # Label smoothing takes the mean of the scores, whose sum is rounded at its own size.
        rounding = torch.finfo(dtype).eps * (count if size == 1.0 else count * size / 10)
        assert abs(result.metrics["loss"].double() - expected).item() <= rounding
        assert (found - wanted).norm() <= 8 * torch.finfo(dtype).eps * wanted.norm()


def test_scores_far_apart_give_finite_losses() -> None:
    values = inputs(8, seed=5)
    with torch.no_grad():
        values["scale"].fill_(1e4)
    masks, ids = everyone(8), torch.tensor([0, 0, 1, 1, 2, 3, 4, 5])
    for kind in MAKERS:
        single = {name: value.detach().float().requires_grad_() for name, value in values.items()}
        result = evaluate_terms([MAKERS[kind](single, masks, ids, 3)])
        expected = reference(MAKERS[kind](values, masks, ids, 3))
        assert all(torch.isfinite(gradient).all() for gradient in gradients(result.local_loss, single)), kind
        if "log" not in kind:  # the reference takes exp of these scores as they are
            assert math.isclose(result.metrics["loss"].item(), expected.item(), rel_tol=1e-5), kind


@pytest.mark.parametrize("tile", [1, 3, 16])
def test_excluded_scores_far_above_the_others_do_not_hide_them(tile: int) -> None:
    """Matched scores of 0 and others of -150, whose exponentials vanish beside exp(0) in single precision."""
    whole = torch.full((16, 16), -150.0).fill_diagonal_(0.0).requires_grad_()
    pairs = Pairs(
        rows={"scores": whole},
        columns={"index": torch.arange(16)},
        scalars={},
        score=lambda rows, columns, _: rows["scores"][:, columns["index"]],
        valid=torch.ones(16, dtype=torch.bool),
        ids=torch.arange(16),
        tile=tile,
    )
    term = LogMeanExp(name="t", weight=1.0, pairs=(pairs,), over="rows", matched=False)
    loss = evaluate_terms([term]).local_loss
    assert math.isclose(loss.item(), -150.0, rel_tol=1e-6)
    expected = (torch.ones(16, 16) - torch.eye(16)) / (16 * 15)
    assert torch.allclose(torch.autograd.grad(loss, whole)[0], expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_score_that_is_no_number_is_not_hidden(kind: str) -> None:
    values = {name: value.detach().clone() for name, value in inputs(6, seed=10).items()}
    values["left"][3, 1] = torch.nan
    assert evaluate_terms([MAKERS[kind](values, everyone(6), torch.arange(6), 4)]).metrics["loss"].isnan()


def test_every_pair_is_scored_once_in_tiles_of_the_size_asked_for() -> None:
    values, shapes = inputs(20, seed=11), []

    def recorded(rows: Inputs, columns: Inputs, scalars: Inputs) -> Tensor:
        shapes.append((len(rows["left"]), len(columns["right"])))
        return score(rows, columns, scalars)

    pairs = replace(pairs_of(values, everyone(20)[0], torch.arange(20), tile=8), score=recorded)
    result = evaluate_terms([CrossEntropy(name="t", weight=1.0, pairs=pairs, label_smoothing=0.1)])
    for _ in range(2):  # forward, and again backward
        assert sum(r * c for r, c in shapes) == 20 * 20
        assert max(max(shape) for shape in shapes) == 8
        shapes.clear()
        torch.autograd.grad(result.local_loss, values["left"], retain_graph=True)


def test_tensors_without_gradient_may_be_of_any_type() -> None:
    """A stop-gradient side, and a flag a column: neither is differentiated."""
    values = inputs(7, seed=6)
    flags = torch.arange(7) % 2 == 0
    pairs = Pairs(
        rows={"left": values["left"]},
        columns={"right": values["right"].detach(), "flag": flags},
        scalars={},
        score=lambda rows, columns, _: torch.where(columns["flag"], rows["left"] @ columns["right"].T, 0.0),
        valid=torch.ones(7, dtype=torch.bool),
        ids=torch.arange(7),
        tile=3,
    )
    term = PairSum(name="t", weight=1.0, pairs=pairs)
    value = evaluate_terms([term]).local_loss
    direction = values["right"][flags].sum(0).expand(7, DIM) / 7
    assert torch.allclose(torch.autograd.grad(value, values["left"])[0], direction)


def test_several_terms_are_summed_by_weight_and_named() -> None:
    values, valid, ids = inputs(5, seed=7), torch.arange(5) != 3, torch.arange(5)
    masks = valid, valid
    first = replace(MAKERS["sigmoid"](values, masks, ids, 2), name="first", weight=0.5)
    second = replace(MAKERS["log mean over pairs"](values, masks, ids, 2), name="second", weight=2.0)
    shown = PerSample(name="shown", weight=0.0, values=values["factor"], valid=valid)
    result = evaluate_terms([first, second, shown])
    expected = 0.5 * reference(first) + 2 * reference(second)
    assert abs(result.metrics["loss"] - expected).item() <= 1e-12
    assert abs(result.local_loss - expected).item() <= 1e-12
    assert abs(result.metrics["shown"] - values["factor"][valid].mean()).item() <= 1e-12
    assert result.metrics["num_samples/first"].item() == result.metrics["num_samples/second"].item() == 4
    assert "num_samples/shown" not in result.metrics


def distributed_case(dtype: torch.dtype) -> tuple[Inputs, Masks, Tensor]:
    """Sixteen samples; no sample of the third quarter is valid, other masks are ragged, items span ranks."""
    masks = some_valid(16, seed=8), some_valid(16, seed=9)
    for mask in masks:
        mask[8:12] = False
        mask[[0, 15]] = True
    return inputs(16, seed=9, dtype=dtype), masks, torch.where(torch.arange(16) % 3 == 0, torch.arange(16) % 2, -1)


def distributed_gradients(world: World, argument: Any) -> dict[str, list[float]]:
    """Loss, gradients of the local rows, and the summed gradients of the scalars, for each kind of term and dtype."""
    found = {}
    for kind, dtype in itertools.product(MAKERS, ("float32", "float64")):
        values, masks, ids = distributed_case(getattr(torch, dtype))
        part = slice(world.rank * 16 // world.size, (world.rank + 1) * 16 // world.size)
        local = {
            name: (value if name in ("scale", "bias") else value[part]).detach().clone().requires_grad_()
            for name, value in values.items()
        }
        term = MAKERS[kind](local, (masks[0][part], masks[1][part]), ids[part], 3)
        result = evaluate_terms([term], world)
        per_sample = gradients(result.local_loss, local)
        scalars = [world.sum(value) for value in per_sample[3:]]
        rows = torch.cat([per_sample[0], per_sample[1], per_sample[2][:, None]], dim=1)
        found[f"{kind}/{dtype}"] = [
            result.metrics["loss"].item(),
            world.sum(result.local_loss).item(),
            *(value.item() for value in scalars),
            *rows.flatten().tolist(),
        ]
    return found


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_with_unequal_masks_equal_one_process(tmp_path: Path, size: int) -> None:
    alone = distributed_gradients(World(), None)
    together = run_ranks("tests.test_pairwise:distributed_gradients", size, tmp_path)
    for case, expected in alone.items():
        tolerance = 1e-6 if case.endswith("float32") else 1e-12
        whole = torch.tensor(expected[4:], dtype=torch.float64)
        parts = torch.tensor([value for rank in together for value in rank[case][4:]], dtype=torch.float64)
        assert whole.norm() > 0, case
        assert ((parts - whole).norm() / whole.norm()).item() <= tolerance, case
        for rank in together:
            for one, other in zip(rank[case][:4], expected[:4], strict=True):
                assert math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance), case
