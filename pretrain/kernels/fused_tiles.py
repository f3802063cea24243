"""Statistics and gradients of pairs by the Triton kernels, in tiles large enough to fill a GPU.

Does what the PyTorch tiles of `pretrain.pair_statistics` do, which are its reference. A tile's scores never leave the
chip; backward writes the slopes of one tile, and one product an axis, for the matrix products that follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton import knobs

from pretrain.kernels.triton_blocks import add_product_kernel, gradient_kernel, statistics_kernel
from pretrain.objectives.scores import CosineScore, Rows, Sums, VolumeScore, axis_names, part_of
from pretrain.pair_grid import PairGrid, Tile
from pretrain.side_statistics import SideGradients, SideStatistics

LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Rows, columns and depth of a program's block, and row blocks that go through the columns together."""

    BLOCK_R: int
    BLOCK_C: int
    BLOCK_D: int = 32
    GROUP: int = 8

    def counts(self, rows: int, columns: int) -> tuple[int, int]:
        """Blocks of rows and of columns."""
        return math.ceil(rows / self.BLOCK_R), math.ceil(columns / self.BLOCK_C)


@dataclass(frozen=True, kw_only=True)
class TileInputs:
    """What the kernels read of a tile: left [r, D], square [r], right [axes, c, D], weight [c], bias [c], and the items
    of its rows and columns, -1 for a sample that is not valid."""

    left: Tensor
    square: Tensor
    right: Tensor
    weight: Tensor
    bias: Tensor
    row_items: Tensor
    column_items: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order in which the kernels take them."""
        return self.left, self.square, self.right, self.weight, self.bias, self.row_items, self.column_items


@dataclass(frozen=True, kw_only=True)
class FusedTiles:
    """tile: rows and columns of a tile; scratch of backward is (modalities) * tile^2 floats, whatever the batch."""

    tile: int = 4096
    score_blocks: Blocks = Blocks(BLOCK_R=128, BLOCK_C=64)
    product_blocks: Blocks = Blocks(BLOCK_R=128, BLOCK_C=128)

    def collect(
        self, grid: PairGrid, tensors: Sequence[Tensor], by_row: SideStatistics, by_column: SideStatistics
    ) -> None:
        """Score all tiles into both sides."""
        rows, columns, scalars = grid.unpack(tensors)
        for tile in self._tiles(grid):
            inputs = _tile_inputs(grid, tile, *grid.cut(tile, rows, columns), scalars)
            num_rows, num_columns = len(inputs.left), inputs.right.shape[1]
            blocks = self.score_blocks.counts(num_rows, num_columns)
            of_rows = inputs.left.new_empty(3, blocks[1], num_rows)
            of_columns = inputs.left.new_empty(3, blocks[0], num_columns)
            self._launch(statistics_kernel, grid, inputs, (*of_rows, *of_columns))
            for side, part, found in ((by_row, tile.rows, of_rows), (by_column, tile.columns, of_columns)):
                shift, sum_exp, total = found
                if "log_sum_exp" in side.wanted:
                    largest = shift.amax(dim=0)
                    largest = torch.where(largest.isinf(), torch.zeros_like(largest), largest)
                    side.add_exponentials(part, largest, (sum_exp * (shift - largest).exp()).sum(dim=0))
                if "sum" in side.wanted:
                    side.sum[part] += total.sum(dim=0)

    def spread(
        self,
        grid: PairGrid,
        tensors: Sequence[Tensor],
        sums: Sequence[Tensor | None],
        sides: tuple[SideGradients, SideGradients],
    ) -> None:
        """Score all tiles again and add the gradients of `tensors` to `sums`; None: not wanted."""
        rows, columns, scalars = grid.unpack(tensors)
        row_sums, column_sums, scalar_sums = grid.unpack(sums)
        for tile in self._tiles(grid):
            cut_rows, cut_columns = grid.cut(tile, rows, columns)
            inputs = _tile_inputs(grid, tile, cut_rows, cut_columns, scalars)
            num_axes, num_columns, _ = inputs.right.shape
            num_rows = len(inputs.left)
            blocks = self.score_blocks.counts(num_rows, num_columns)
            volume = isinstance(grid.pairs.score, VolumeScore)
            products = inputs.left.new_empty((num_axes, num_rows, num_columns) if volume else (0,))
            slopes = inputs.left.new_empty(num_rows, num_columns)
            of_rows = inputs.left.new_empty(blocks[1], num_rows)
            of_columns = inputs.left.new_empty(blocks[0], num_columns)
            vectors = [
                vector[part].contiguous()
                for side, part in zip(sides, (tile.rows, tile.columns), strict=True)
                for vector in (side.shift, side.share, side.by_sum)
            ]
            self._launch(gradient_kernel, grid, inputs, (*vectors, products, slopes, of_rows, of_columns))
            totals = part_of(row_sums, tile.rows), part_of(column_sums, tile.columns), scalar_sums
            along_columns, along_rows = of_columns.sum(dim=0), of_rows.sum(dim=0)
            if volume:
                _add_volume_parts(cut_columns, scalars, totals, along_rows, along_columns)
                by_product, left_sum = products.mul_(slopes), totals[0]["anchor"]
                right_sums = [totals[1][name] for name in axis_names(cut_columns)]
            else:
                _add_cosine_parts(totals[2], along_rows, along_columns)
                by_product, left_sum, right_sums = slopes[None], totals[0]["left"], [totals[1]["right"]]
            score = _score(grid)
            for grad, right, right_sum in zip(score.factor(by_product), inputs.right, right_sums, strict=True):
                if left_sum is not None:
                    self._add_product(left_sum, grad, right, _bfloat16(score))
                if right_sum is not None:
                    self._add_product(right_sum, grad.T, inputs.left, _bfloat16(score))

    def _tiles(self, grid: PairGrid) -> Iterator[Tile]:
        return replace(grid, pairs=replace(grid.pairs, tile=self.tile), has_repeats=False).tiles()

    def _launch(self, kernel: object, grid: PairGrid, inputs: TileInputs, outputs: tuple[Tensor, ...]) -> None:
        score = _score(grid)
        num_axes, num_columns, dim = inputs.right.shape
        num_rows = len(inputs.left)
        blocks = self.score_blocks.counts(num_rows, num_columns)
        volume = isinstance(score, VolumeScore)
        floor = score.floor(torch.float32) if isinstance(score, VolumeScore) else 0.0
        kernel[(blocks[0] * blocks[1],)](  # type: ignore[index]
            *inputs.tensors, *outputs, num_rows, num_columns, dim, floor, *blocks,
            NUM_AXES=num_axes if volume else 0, BFLOAT16=_bfloat16(score), **vars(self.score_blocks), **LAUNCH,
        )  # fmt: skip

    def _add_product(self, total: Tensor, left: Tensor, right: Tensor, bfloat16: bool) -> None:
        """total += left @ right"""
        rows, columns = total.shape
        blocks = self.product_blocks.counts(rows, columns)
        add_product_kernel[(blocks[0] * blocks[1],)](
            total, left, right, rows, columns, left.shape[1], *left.stride(), *right.stride(), *blocks,
            BFLOAT16=bfloat16, **vars(self.product_blocks), **LAUNCH,
        )  # fmt: skip


def _score(grid: PairGrid) -> VolumeScore | CosineScore:
    assert isinstance(grid.pairs.score, VolumeScore | CosineScore)
    return grid.pairs.score


def _bfloat16(score: VolumeScore | CosineScore) -> bool:
    """Whether products are those of bfloat16 units. Factors are rounded before, so this changes speed alone; Triton's
    interpreter reads the bits of a bfloat16 factor as an integer."""
    return score.negatives_precision == "bfloat16" and not knobs.runtime.interpret


def _tile_inputs(grid: PairGrid, tile: Tile, rows: Rows, columns: Rows, scalars: Rows) -> TileInputs:
    nobody = grid.items.new_full((), -1)
    row_items = torch.where(grid.pairs.valid[tile.rows], grid.items[grid.own][tile.rows], nobody)
    column_items = torch.where(grid.column_valid[tile.columns], grid.items[tile.columns], nobody)
    score = _score(grid)
    if isinstance(score, VolumeScore):
        left, square = rows["anchor"], rows["square"]
        right = torch.stack([columns[name] for name in axis_names(columns)])
        weight = columns["volume"] * scalars["scale"]
        bias = torch.zeros_like(weight)
    else:
        left, right = rows["left"], columns["right"][None]
        square = left.new_zeros(len(left))
        weight = scalars["scale"].expand(right.shape[1])
        bias = scalars["bias"].expand_as(weight) if "bias" in scalars else torch.zeros_like(weight)
    return TileInputs(
        left=score.factor(left).contiguous(),
        square=square.contiguous(),
        right=score.factor(right).contiguous(),
        weight=weight.contiguous(),
        bias=bias.contiguous(),
        row_items=row_items,
        column_items=column_items,
    )


def _add_volume_parts(
    columns: Rows, scalars: Rows, totals: tuple[Sums, Sums, Sums], slope_of_rows: Tensor, by_distance: Tensor
) -> None:
    row_sums, column_sums, scalar_sums = totals
    if (square := row_sums["square"]) is not None:
        square.sub_(slope_of_rows, alpha=0.5)
    if (volume := column_sums["volume"]) is not None:
        volume -= by_distance * scalars["scale"]
    if (scale := scalar_sums["scale"]) is not None:
        scale -= torch.dot(by_distance, columns["volume"])


def _add_cosine_parts(scalar_sums: Sums, by_score: Tensor, by_product: Tensor) -> None:
    if (scale := scalar_sums["scale"]) is not None:
        scale += by_product.sum()
    if (bias := scalar_sums.get("bias")) is not None:
        bias += by_score.sum()
