"""The loss of a global batch from the terms of an objective, in one process or with the samples spread over ranks.

`pair_statistics` lets samples meet; what is left are formulas on vectors with one entry a sample. Sums are divided by
all-reduced counts, so ragged masks on the ranks weigh every sample alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pretrain.collectives import ALONE, World
from pretrain.objectives.terms import (
    CrossEntropy,
    LogMeanExp,
    LogMeanProduct,
    PairSum,
    SigmoidCrossEntropy,
    Term,
    TermSum,
    TupleCrossEntropy,
)
from pretrain.pair_statistics import OneSide, PairStatistics, pair_statistics
from pretrain.side_statistics import SOFTPLUS_LINEAR_FROM, Statistic
from pretrain.tuples import tuple_cross_entropy


@dataclass(frozen=True, kw_only=True)
class TermsValue:
    """local_loss: this rank's share, the sum over ranks is the loss.

    metrics: global scalars: `loss`, the value of each term, and how many samples took part in it; of terms without
    weight, the value alone, and none where no sample takes part.
    """

    local_loss: Tensor
    metrics: dict[str, Tensor]


def evaluate_terms(terms: Sequence[Term], world: World = ALONE) -> TermsValue:
    """Evaluate the terms of the local samples within the global batch.

    The gradient of `local_loss`, summed over ranks, is the gradient of the loss over the global batch, for whatever
    the terms' tensors were computed from. All ranks must pass the same kinds of terms in the same order.
    """
    shares, counts = zip(*(_evaluate(term, world) for term in terms), strict=True)
    totals = world.sum(torch.stack(shares))
    weights = _weights(terms, torch.stack(counts).to(totals.dtype))
    weighted = [index for index, term in enumerate(terms) if term.weight]  # others may hold no gradient at all
    local_loss = sum((shares[index] * weights[index] for index in weighted), start=totals.new_zeros(()))
    metrics = {term.name: total for term, total, n in zip(terms, totals, counts, strict=True) if term.weight or n > 0}
    metrics |= {f"num_samples/{term.name}": n for term, n in zip(terms, counts, strict=True) if term.weight}
    return TermsValue(local_loss=local_loss, metrics={"loss": (weights * totals)[weighted].sum(), **metrics})


def _weights(terms: Sequence[Term], counts: Tensor) -> Tensor:
    """[terms]; those of a group are divided by how many of it have samples. counts [terms]: samples of each."""
    weights = counts.new_tensor([term.weight for term in terms])
    for group in {term.mean_over for term in terms if term.mean_over}:
        members = [index for index, term in enumerate(terms) if term.mean_over == group]
        weights[members] = weights[members] / (counts[members] > 0).sum().clamp_min(1)
    return weights


def _evaluate(term: Term, world: World) -> tuple[Tensor, Tensor]:
    """This rank's share of a term's value, and how many samples of the global batch take part."""
    if isinstance(term, CrossEntropy):
        return _cross_entropy(term, world)
    if isinstance(term, SigmoidCrossEntropy):
        return _sigmoid_cross_entropy(term, world)
    if isinstance(term, LogMeanExp):
        return _log_mean_exp(term, world)
    if isinstance(term, LogMeanProduct):
        return _log_mean_product(term, world)
    if isinstance(term, PairSum):
        return _pair_sum(term, world)
    if isinstance(term, TupleCrossEntropy):
        return tuple_cross_entropy(term, world)
    if isinstance(term, TermSum):
        shares, counts = zip(*(_evaluate(part, world) for _, part in term.parts), strict=True)
        factors = [factor for factor, _ in term.parts]
        total = torch.stack([factor * share for factor, share in zip(factors, shares, strict=True)]).sum()
        return total, torch.stack(counts).max()
    count = world.sum(term.valid.sum().to(term.values.dtype))
    return _masked_sum(term.values, term.valid) / count.clamp_min(1), count


def _masked_sum(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values, torch.zeros_like(values)).sum()


def _cross_entropy(term: CrossEntropy, world: World) -> tuple[Tensor, Tensor]:
    wanted: frozenset[Statistic] = frozenset(["log_sum_exp", "sum"] if term.label_smoothing else ["log_sum_exp"])
    nothing: frozenset[Statistic] = frozenset()
    statistics = pair_statistics(
        term.pairs,
        world,
        rows=wanted if term.row_weight else nothing,
        columns=wanted if term.column_weight else nothing,
    )
    values = torch.zeros_like(statistics.matched)
    for weight, side in ((term.row_weight, statistics.row), (term.column_weight, statistics.column)):
        if weight:
            values = values + weight * _cross_entropies(statistics, side, term.label_smoothing)
    count = statistics.num_valid
    return _masked_sum(values, term.pairs.valid) / count.clamp_min(1), count


def _cross_entropies(statistics: PairStatistics, side: OneSide, smoothing: float) -> Tensor:
    """[n]: log(1 + sum_j exp(s_j - s_i)) + smoothing * (s_i - mean s), which no size of the scores can spoil."""
    matched, count = statistics.matched, statistics.num_others
    values = softplus(side.shift - matched + side.log_sum, threshold=SOFTPLUS_LINEAR_FROM)
    return values + smoothing * (count * matched - side.sum) / (count + 1) if smoothing else values


def _sigmoid_cross_entropy(term: SigmoidCrossEntropy, world: World) -> tuple[Tensor, Tensor]:
    statistics = pair_statistics(term.pairs, world, rows=frozenset(["softplus_sum"]))
    values = softplus(-statistics.matched, threshold=SOFTPLUS_LINEAR_FROM) + statistics.row.softplus_sum
    count = statistics.num_valid
    return _masked_sum(values, term.pairs.valid) / count.clamp_min(1), count


def _pair_sum(term: PairSum, world: World) -> tuple[Tensor, Tensor]:
    statistics = pair_statistics(term.pairs, world, rows=frozenset(["sum"]))
    values, count = statistics.row.sum, statistics.num_valid
    if term.matched:
        values = values + statistics.matched
    divisor = count
    if term.normalizer == "pairs":
        divisor = world.sum(_num_pairs(statistics, term.pairs.valid, term.matched).sum())
    return _masked_sum(values, term.pairs.valid) / divisor.clamp_min(1), count


def _num_pairs(statistics: PairStatistics, valid: Tensor, matched: bool) -> Tensor:
    """[n]: how many pairs of its row count."""
    return statistics.num_others + valid.to(statistics.num_others.dtype) * matched


def _log_mean_exp(term: LogMeanExp, world: World) -> tuple[Tensor, Tensor]:
    logs, took_part = [], []
    for pairs in term.pairs:
        statistics = pair_statistics(pairs, world, rows=frozenset(["log_sum_exp"]))
        log_sum = statistics.row.shift + statistics.row.log_sum
        num_pairs = _num_pairs(statistics, pairs.valid, term.matched)
        if term.normalizer == "samples":
            norm = statistics.num_valid
        else:
            norm = num_pairs if term.over == "rows" else world.sum(num_pairs.sum())
        if term.matched:
            log_sum = torch.logaddexp(log_sum, statistics.matched)
        logs.append(torch.where(num_pairs > 0, log_sum - norm.clamp_min(1).log(), torch.full_like(log_sum, -torch.inf)))
        took_part.append(num_pairs > 0)
    stacked, counted = torch.stack(logs, dim=1), torch.stack(took_part, dim=1)
    count = world.sum(counted.any(dim=1).sum().to(stacked.dtype))
    if term.over == "pairs":
        return _share_of_log_sum_exp(stacked, counted, world), count
    some = counted.any(dim=1)
    rows = torch.where(some[:, None], stacked, torch.zeros_like(stacked)).logsumexp(dim=1)
    return _masked_sum(rows, some) / count.clamp_min(1), count


def _log_mean_product(term: LogMeanProduct, world: World) -> tuple[Tensor, Tensor]:
    valid = torch.stack([pairs.valid for pairs in term.pairs]).all(dim=0)
    total = torch.zeros_like(next(iter(term.pairs[0].rows.values()))[:, 0])
    for pairs in term.pairs:
        statistics = pair_statistics(pairs, world, rows=frozenset(["log_sum_exp"]))
        log_sum = torch.logaddexp(statistics.row.shift + statistics.row.log_sum, statistics.matched)
        num_pairs = _num_pairs(statistics, pairs.valid, True)
        total = total + torch.where(valid, log_sum - num_pairs.clamp_min(1).log(), torch.zeros_like(log_sum))
    count = world.sum(valid.sum().to(total.dtype))
    share = _share_of_log_sum_exp(
        torch.where(valid, term.power * total - count.clamp_min(1).log(), torch.full_like(total, -torch.inf))[:, None],
        valid[:, None],
        world,
    )
    return share, count


def _share_of_log_sum_exp(logs: Tensor, counted: Tensor, world: World) -> Tensor:
    """This rank's share of log sum exp(logs) over all ranks: in value, and in gradient, its part of the sum of exp."""
    exponents = torch.where(counted, logs, torch.full_like(logs, -torch.inf)).detach()
    maximum = world.max(exponents.max())
    shift = torch.where(maximum.isinf(), torch.zeros_like(maximum), maximum)
    weights = (exponents - shift).exp()
    total = world.sum(weights.sum())
    total = torch.where(total > 0, total, torch.ones_like(total))
    finite = torch.where(counted, logs, torch.zeros_like(logs))
    return (weights / total * (shift + total.log() + finite - finite.detach())).sum()
