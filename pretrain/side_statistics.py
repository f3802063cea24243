"""Statistics of all rows of scores, or of all columns, gathered tile by tile, and the gradient they give a tile.

Exponentials of a tile are taken once for rows and columns where one shift serves both: a row's log-sum-exp is the same
for any shift that keeps its terms from overflowing and from vanishing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pretrain.collectives import World
from pretrain.pair_grid import Tile

Statistic = Literal["log_sum_exp", "sum", "softplus_sum"]
SOFTPLUS_LINEAR_FROM = 40.0  # exp(-40) is below the rounding of 40 in double precision; torch's 20 is not
SHARED_RANGE = 80.0  # of the scores of a tile: exp(-80), and a gradient over it, are normal numbers in single precision


class SideStatistics:
    """Online statistics [size] of each row (dim 1: the one that is reduced), or of each column (dim 0).

    A log-sum-exp is log(sum_exp) + shift; shift is -inf before the first counted pair.
    """

    def __init__(self, wanted: frozenset[Statistic], size: int, dim: int, like: Tensor) -> None:
        self.wanted, self.dim = wanted, dim
        self.shift = like.new_full((size,), -torch.inf)
        self.sum_exp, self.sum, self.softplus_sum = (like.new_zeros(size) for _ in range(3))

    def add_exponentials(self, part: slice, shift: Tensor, sum_exp: Tensor) -> None:
        """Take in sums of exp(score - shift) over the counted pairs of a tile."""
        shift = torch.where(sum_exp > 0, shift, -torch.inf)  # what is not counted must not move the shift
        together = torch.maximum(self.shift[part], shift)
        finite = _finite(together)
        before = self.sum_exp[part] * (self.shift[part] - finite).exp()
        self.sum_exp[part] = before + sum_exp * (shift - finite).exp()
        self.shift[part] = together

    def reduce(self, world: World) -> None:
        """Combine what all ranks saw."""
        if world.size == 1 or not self.wanted:
            return
        shift = world.max(self.shift)
        sum_exp = self.sum_exp * (self.shift - _finite(shift)).exp()
        self.sum_exp, self.sum, self.softplus_sum = world.sum(torch.stack([sum_exp, self.sum, self.softplus_sum]))
        self.shift = shift

    def outputs(self, own: slice) -> tuple[Tensor, ...]:
        """shift, log_sum, sum, softplus_sum of the local samples."""
        vectors = (_finite(self.shift), self.sum_exp.log(), self.sum, self.softplus_sum)
        return tuple(vector[own].clone() for vector in vectors)


def _finite(shift: Tensor) -> Tensor:
    return torch.where(shift.isinf(), torch.zeros_like(shift), shift)


def add_tile(tile: Tile, scores: Tensor, by_row: SideStatistics, by_column: SideStatistics) -> None:
    """Take in the scores [r, c] of a tile."""
    sides = ((by_row, tile.rows), (by_column, tile.columns))
    exponential = [(side, part) for side, part in sides if "log_sum_exp" in side.wanted]
    shift = _shared_shift(scores) if exponential else None
    if shift is not None:
        terms = tile.zero_excluded_((scores - shift).exp_())
        for side, part in exponential:
            side.add_exponentials(part, shift, terms.sum(side.dim))
    elif exponential:
        kept = scores if tile.counts_all else scores.masked_fill(tile.excluded(scores), -torch.inf)
        for side, part in exponential:
            own = _finite(kept.amax(side.dim))
            side.add_exponentials(part, own, (kept - own.unsqueeze(side.dim)).exp_().sum(side.dim))
    wanted = by_row.wanted | by_column.wanted
    if "softplus_sum" in wanted:
        values = tile.zero_excluded_(softplus(scores, threshold=SOFTPLUS_LINEAR_FROM))
        for side, part in sides:
            if "softplus_sum" in side.wanted:
                side.softplus_sum[part] += values.sum(side.dim)
    if "sum" in wanted:
        values = scores if tile.counts_all else tile.zero_excluded_(scores.clone())
        for side, part in sides:
            if "sum" in side.wanted:
                side.sum[part] += values.sum(side.dim)


def _shared_shift(scores: Tensor) -> Tensor | None:
    """The largest score [], or None where the smallest is too far from it (or one is no number)."""
    low, high = torch.aminmax(scores)
    return high if high - low <= SHARED_RANGE else None


@dataclass(frozen=True, kw_only=True)
class SideGradients:
    """What the gradient of a score takes from its row (dim 1), or from its column (dim 0); all [size].

    The gradient is exp(score - shift) * share + by_sum + sigmoid(score) * by_softplus_sum; what is not wanted is zeros.
    """

    wanted: frozenset[Statistic]
    dim: int
    shift: Tensor
    share: Tensor
    by_sum: Tensor
    by_softplus_sum: Tensor

    @classmethod
    def of(cls, side: SideStatistics, by_log_sum: Tensor, by_sum: Tensor, by_softplus_sum: Tensor) -> SideGradients:
        """From the gradients of log_sum, sum and softplus_sum."""
        nothing = torch.zeros_like(side.sum_exp)
        share = nothing
        if "log_sum_exp" in side.wanted:
            share = torch.where(side.sum_exp > 0, by_log_sum / side.sum_exp, nothing)
        return cls(
            wanted=side.wanted,
            dim=side.dim,
            shift=_finite(side.shift),
            share=share,
            by_sum=by_sum if "sum" in side.wanted else nothing,
            by_softplus_sum=by_softplus_sum if "softplus_sum" in side.wanted else nothing,
        )


def score_gradient(tile: Tile, scores: Tensor, by_row: SideGradients, by_column: SideGradients) -> Tensor:
    """Gradient [r, c] of the scores of a tile; 0 where a pair is excluded."""
    sides = ((by_row, tile.rows), (by_column, tile.columns))
    exponential = [(side, part) for side, part in sides if "log_sum_exp" in side.wanted]
    shift = _shared_shift(scores) if exponential else None
    if shift is not None:
        # Where a row counts no pair of this tile its shift may be below the tile's.
        weights = [
            (side.share[part] * (shift - side.shift[part]).clamp_max(0).exp()).unsqueeze(side.dim)
            for side, part in exponential
        ]
        total = (scores - shift).exp_().mul_(weights[0] + weights[1] if len(weights) == 2 else weights[0])
    else:
        total = torch.zeros_like(scores)
        for side, part in exponential:
            terms = (scores - side.shift[part].unsqueeze(side.dim)).clamp_max_(0).exp_()
            total.addcmul_(terms, side.share[part].unsqueeze(side.dim))
    sums = [side.by_sum[part].unsqueeze(side.dim) for side, part in sides if "sum" in side.wanted]
    if sums:
        total += sums[0] + sums[1] if len(sums) == 2 else sums[0]
    for side, part in sides:
        if "softplus_sum" in side.wanted:
            total.addcmul_(scores.sigmoid(), side.by_softplus_sum[part].unsqueeze(side.dim))
    return tile.zero_excluded_(total)
