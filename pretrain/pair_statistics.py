"""Statistics of every row of scores and of every column, exactly: where samples of a global batch meet each other.

Each rank scores its own rows against the columns of all ranks, in tiles, so that every pair is scored once and no
[global, global] matrix exists. One pass serves rows and columns: row statistics stay local, column statistics are
all-reduced. The backward pass scores the tiles again; gradients of the columns return to their owners by a
reduce-scatter. Whatever an objective makes of its scores is plain autograd on these vectors (`pretrain.pairwise`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.collectives import World
from pretrain.kernels.choice import fused_tiles
from pretrain.objectives.scores import Rows, Sums, TileScore, part_of
from pretrain.objectives.terms import Pairs
from pretrain.pair_grid import PairGrid, Tile
from pretrain.side_statistics import SideGradients, SideStatistics, Statistic, add_tile, score_gradient

KEPT_BYTES = 64 << 20  # of scored tiles that stay for backward, at any size of the batch; others are scored again
Kept = dict[int, tuple[Tensor, tuple[Tensor, ...]]]  # by number of the tile: its scores, and what their score keeps
Wanted = tuple[frozenset[Statistic], frozenset[Statistic]]  # of rows, of columns


@dataclass(frozen=True, kw_only=True)
class OneSide:
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
    row: OneSide
    column: OneSide


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
        row=OneSide(**dict(zip(_OUTPUTS, outputs[1:5], strict=True))),
        column=OneSide(**dict(zip(_OUTPUTS, outputs[5:], strict=True))),
    )


_OUTPUTS = ("shift", "log_sum", "sum", "softplus_sum")


class _TiledStatistics(torch.autograd.Function):
    """(rows [n, ...]..., columns [N, ...]..., scalars...) -> matched [n], then four vectors [n] a side."""

    @staticmethod
    def forward(ctx: Any, grid: PairGrid, world: World, wanted: Wanted, *tensors: Tensor) -> tuple[Tensor, ...]:
        like = next(tensor for tensor in tensors if tensor.is_floating_point())
        by_row = SideStatistics(wanted[0], len(grid.pairs.valid), 1, like)
        by_column = SideStatistics(wanted[1], len(grid.column_valid), 0, like)
        kept: Kept = {}
        fused = fused_tiles(grid.pairs, wanted[0] | wanted[1], like)
        if fused is None:
            matched = _collect(grid, tensors, by_row, by_column, kept if any(ctx.needs_input_grad) else None)
        else:
            matched = torch.zeros_like(by_row.sum)  # such pairs bring their own
            fused.collect(grid, tensors, by_row, by_column)
        by_column.reduce(world)
        ctx.grid, ctx.world, ctx.fused, ctx.sides = grid, world, fused, (by_row, by_column)
        ctx.kept = kept
        ctx.save_for_backward(*tensors)
        row, column = by_row.outputs(slice(None)), by_column.outputs(grid.own)
        ctx.mark_non_differentiable(row[0], column[0])
        return matched, *row, *column

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_row, by_column = ctx.sides
        row_grads, column_grads = grads[2:5], grads[6:]
        if by_column.wanted:
            column_grads = ctx.world.gather_rows(torch.stack(column_grads, dim=1)).unbind(1)
        sides = SideGradients.of(by_row, *row_grads), SideGradients.of(by_column, *column_grads)
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        sums = [  # rows one after the other, however those of the tensor lie: the fused kernel adds to them
            torch.zeros_like(tensor, memory_format=torch.contiguous_format) if need else None
            for tensor, need in zip(tensors, needed, strict=True)
        ]
        if ctx.fused is None:
            _spread(ctx.grid, tensors, sums, grads[0], sides, ctx.kept)
        else:
            ctx.fused.spread(ctx.grid, tensors, sums, sides)
        return None, None, None, *sums


def _collect(
    grid: PairGrid,
    tensors: Sequence[Tensor],
    by_row: SideStatistics,
    by_column: SideStatistics,
    kept: Kept | None,
) -> Tensor:
    """Score all tiles into both sides, and the first ones into `kept`; returns the scores of matched pairs [n]."""
    rows, columns, scalars = grid.unpack(tensors)
    score, free_bytes = grid.pairs.score, KEPT_BYTES
    matched = by_row.sum.new_zeros(len(grid.pairs.valid))
    for number, tile in enumerate(grid.tiles()):
        parts = (*grid.cut(tile, rows, columns), scalars)
        if isinstance(score, TileScore):
            scores, more = score.forward(*parts)
            free_bytes -= sum(tensor.nbytes for tensor in (scores, *more))
            if kept is not None and free_bytes >= 0:
                kept[number] = scores, more
        else:
            scores = score(*parts)
        if tile.matched is not None:
            matched[tile.rows][tile.matched[0]] = scores[tile.matched].diagonal()
        add_tile(tile, scores, by_row, by_column)
    return matched


def _spread(
    grid: PairGrid,
    tensors: Sequence[Tensor],
    sums: Sequence[Tensor | None],
    by_matched: Tensor,
    sides: tuple[SideGradients, SideGradients],
    kept: Kept,
) -> None:
    """Score all tiles that were not kept again and add the gradients of `tensors` to `sums`; None: not wanted."""
    rows, columns, scalars = grid.unpack(tensors)
    row_sums, column_sums, scalar_sums = grid.unpack(sums)
    score = grid.pairs.score

    def gradient(tile: Tile, scores: Tensor) -> Tensor:
        found = score_gradient(tile, scores, *sides)
        if tile.matched is not None and grid.pairs.matched is None:
            found[tile.matched].diagonal().copy_(by_matched[tile.rows][tile.matched[0]])
        return found

    for number, tile in enumerate(grid.tiles()):
        parts = (*grid.cut(tile, rows, columns), scalars)
        totals = part_of(row_sums, tile.rows), part_of(column_sums, tile.columns), scalar_sums
        if isinstance(score, TileScore):
            # What was kept is written over: a second backward finds none.
            scores, more = kept.pop(number) if number in kept else score.forward(*parts)
            score.backward(more, gradient(tile, scores), parts, totals)
            continue
        leaves = tuple(_leaves(part, total) for part, total in zip(parts, totals, strict=True))
        with torch.enable_grad():
            scores = score(*leaves)
        targets = [
            (leaf, total)
            for group, group_totals in zip(leaves, totals, strict=True)
            for leaf, total in zip(group.values(), group_totals.values(), strict=True)
            if total is not None
        ]
        by_score = gradient(tile, scores.detach())
        found = torch.autograd.grad(scores, [leaf for leaf, _ in targets], by_score, materialize_grads=True)
        for (_, total), grad in zip(targets, found, strict=True):
            total += grad


def _leaves(tensors: Rows, sums: Sums) -> Rows:
    return {name: tensor.detach().requires_grad_(sums[name] is not None) for name, tensor in tensors.items()}
