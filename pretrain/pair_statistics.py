"""Statistics of every row of scores and of every column, exactly: where samples of a global batch meet each other.

Each rank scores its own rows against the columns of all ranks, in tiles, so that every pair is scored once and no
[global, global] matrix exists. One pass serves rows and columns: row statistics stay local, column statistics are
all-reduced. The backward pass scores the tiles again; gradients of the columns return to their owners by a
reduce-scatter. Whatever an objective makes of its scores is plain autograd on these vectors (`pretrain.pairwise`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pretrain.collectives import World
from pretrain.objectives.terms import Pairs
from pretrain.pair_grid import PairGrid, Tile

Statistic = Literal["log_sum_exp", "sum", "softplus_sum"]
Wanted = tuple[frozenset[Statistic], frozenset[Statistic]]  # of rows, of columns
SOFTPLUS_LINEAR_FROM = 40.0  # exp(-40) is below the rounding of 40 in double precision; torch's 20 is not


@dataclass(frozen=True, kw_only=True)
class SideStatistics:
    """Over the counted pairs of a sample with others, as a row or as a column; all [n], zeros unless asked for.

    The log-sum-exp is shift + log_sum: apart, so that subtracting a score of any size from it loses nothing. shift is
    without gradient, log_sum has all of it. Without a pair: shift 0, log_sum -inf.
    """

    shift: Tensor
    log_sum: Tensor
    sum: Tensor
    softplus_sum: Tensor


@dataclass(frozen=True, kw_only=True)
class PairStatistics:
    """Of the local samples, as rows and as columns.

    matched [n]: scores of the pairs (i, i). num_others [n]: with how many samples of the global batch a sample is
    paired, itself left out. Both are 0 where the sample is not valid. num_valid []: valid samples of the global batch.
    """

    matched: Tensor
    num_others: Tensor
    num_valid: Tensor
    row: SideStatistics
    column: SideStatistics


def pair_statistics(
    pairs: Pairs, world: World, *, rows: frozenset[Statistic], columns: frozenset[Statistic] = frozenset()
) -> PairStatistics:
    """Compute the statistics named for rows and for columns, in one pass over the tiles.

    Gradients are those of the sum over ranks of whatever each rank computes from its own vectors. All ranks must pass
    the same kind of pairs, with equally many samples.
    """
    grid = PairGrid.over(pairs, world)
    columns_of_all = [world.gather_rows(tensor) for tensor in pairs.columns.values()]
    outputs = _TiledStatistics.apply(
        grid, world, (rows, columns), *pairs.rows.values(), *columns_of_all, *pairs.scalars.values()
    )
    matched = outputs[0] if pairs.matched is None else pairs.matched
    return PairStatistics(
        matched=torch.where(pairs.valid, matched, torch.zeros_like(matched)),
        num_others=grid.num_others.to(matched.dtype),
        num_valid=grid.num_valid.to(matched.dtype),
        row=SideStatistics(**dict(zip(_OUTPUTS, outputs[1:5], strict=True))),
        column=SideStatistics(**dict(zip(_OUTPUTS, outputs[5:], strict=True))),
    )


_OUTPUTS = ("shift", "log_sum", "sum", "softplus_sum")


class _Side:
    """Online statistics of each row, or of each column (dim: the one that is reduced)."""

    def __init__(self, wanted: frozenset[Statistic], size: int, dim: int, like: Tensor) -> None:
        self.wanted, self.dim = wanted, dim
        self.maximum = like.new_full((size,), -torch.inf)
        self.sum_exp, self.sum, self.softplus_sum = (like.new_zeros(size) for _ in range(3))

    def add(self, part: slice, scores: Tensor, excluded: Tensor | None) -> None:
        """Take in a tile of scores."""
        if "log_sum_exp" in self.wanted:
            kept = scores if excluded is None else scores.masked_fill(excluded, -torch.inf)
            maximum = torch.maximum(self.maximum[part], kept.amax(self.dim))
            shift = _finite(maximum)
            seen = self.sum_exp[part] * (self.maximum[part] - shift).exp()
            self.sum_exp[part] = seen + (kept - shift.unsqueeze(self.dim)).exp_().sum(self.dim)
            self.maximum[part] = maximum
        if "sum" in self.wanted:
            self.sum[part] += _zero_where(scores, excluded).sum(self.dim)
        if "softplus_sum" in self.wanted:
            values = softplus(scores, threshold=SOFTPLUS_LINEAR_FROM)
            self.softplus_sum[part] += _zero_where(values, excluded).sum(self.dim)

    def reduce(self, world: World) -> None:
        """Combine what all ranks saw."""
        if world.size == 1 or not self.wanted:
            return
        maximum = world.max(self.maximum)
        sum_exp = self.sum_exp * (self.maximum - _finite(maximum)).exp()
        self.sum_exp, self.sum, self.softplus_sum = world.sum(torch.stack([sum_exp, self.sum, self.softplus_sum]))
        self.maximum = maximum

    def outputs(self, own: slice) -> tuple[Tensor, ...]:
        """shift, log_sum, sum, softplus_sum of the local samples."""
        vectors = (_finite(self.maximum), self.sum_exp.log(), self.sum, self.softplus_sum)
        return tuple(vector[own].clone() for vector in vectors)

    def add_gradient(self, total: Tensor, part: slice, scores: Tensor, grads: Sequence[Tensor]) -> None:
        """Add to `total` [r, c] the gradient of the scores; grads: of log_sum, sum and softplus_sum."""
        by_log_sum, by_sum, by_softplus_sum = (grad[part].unsqueeze(self.dim) for grad in grads)
        if "log_sum_exp" in self.wanted:
            sum_exp = self.sum_exp[part].unsqueeze(self.dim)
            share = torch.where(sum_exp > 0, by_log_sum / sum_exp, torch.zeros_like(sum_exp))
            total.addcmul_((scores - _finite(self.maximum[part]).unsqueeze(self.dim)).exp_(), share)
        if "sum" in self.wanted:
            total.add_(by_sum)
        if "softplus_sum" in self.wanted:
            total.addcmul_(scores.sigmoid(), by_softplus_sum)


def _finite(maximum: Tensor) -> Tensor:
    return torch.where(maximum.isinf(), torch.zeros_like(maximum), maximum)


def _zero_where(values: Tensor, excluded: Tensor | None) -> Tensor:
    return values if excluded is None else values.masked_fill(excluded, 0.0)


class _TiledStatistics(torch.autograd.Function):
    """(rows [n, ...]..., columns [N, ...]..., scalars...) -> matched [n], then four vectors [n] a side."""

    @staticmethod
    def forward(ctx: Any, grid: PairGrid, world: World, wanted: Wanted, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows, columns, scalars = grid.unpack(tensors)
        like = next(tensor for tensor in tensors if tensor.is_floating_point())
        matched = like.new_zeros(len(grid.pairs.valid))
        by_row = _Side(wanted[0], len(matched), 1, like)
        by_column = _Side(wanted[1], len(grid.column_valid), 0, like)
        for tile in grid.tiles():
            scores = grid.pairs.score(*grid.cut(tile, rows, columns), scalars)
            if tile.matched is not None:
                matched[tile.rows][tile.matched[0]] = scores[tile.matched].diagonal()
            by_row.add(tile.rows, scores, tile.excluded)
            by_column.add(tile.columns, scores, tile.excluded)
        by_column.reduce(world)
        ctx.grid, ctx.world, ctx.sides = grid, world, (by_row, by_column)
        ctx.save_for_backward(*tensors)
        row, column = by_row.outputs(slice(None)), by_column.outputs(grid.own)
        ctx.mark_non_differentiable(row[0], column[0])
        return matched, *row, *column

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grid: PairGrid = ctx.grid
        by_row, by_column = ctx.sides
        row_grads, column_grads = grads[2:5], grads[6:]
        if by_column.wanted:
            column_grads = tuple(ctx.world.gather_rows(torch.stack(column_grads, dim=1)).unbind(1))
        needed = ctx.needs_input_grad[3:]
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
        sums = [torch.zeros_like(tensor) if need else None for tensor, need in zip(tensors, needed, strict=True)]
        rows, columns, scalars = grid.unpack(tensors)
        for tile in grid.tiles():
            cut_rows, cut_columns = grid.cut(tile, rows, columns)
            parts = [*cut_rows.values(), *cut_columns.values(), *scalars.values()]
            leaves = [part.detach().requires_grad_(need) for part, need in zip(parts, needed, strict=True)]
            with torch.enable_grad():
                scores = grid.pairs.score(*grid.unpack(leaves))
            score_grad = _score_gradient(tile, scores.detach(), by_row, by_column, row_grads, column_grads)
            if tile.matched is not None and grid.pairs.matched is None:
                score_grad[tile.matched].diagonal().copy_(grads[0][tile.rows][tile.matched[0]])
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(scores, wanted, score_grad, materialize_grads=True))
            places = [tile.rows] * len(rows) + [tile.columns] * len(columns) + [...] * len(scalars)
            for total, place in zip(sums, places, strict=True):
                if total is not None:
                    total[place] += next(found)
        return None, None, None, *sums


def _score_gradient(
    tile: Tile,
    scores: Tensor,
    by_row: _Side,
    by_column: _Side,
    row_grads: Sequence[Tensor],
    column_grads: Sequence[Tensor],
) -> Tensor:
    """Gradient [r, c] of the scores of a tile; 0 where a pair is not counted."""
    total = torch.zeros_like(scores)
    by_row.add_gradient(total, tile.rows, scores, row_grads)
    by_column.add_gradient(total, tile.columns, scores, column_grads)
    return total if tile.excluded is None else total.masked_fill_(tile.excluded, 0.0)
