"""Which pairs a tile of scores holds, and which of them count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.collectives import World
from pretrain.objectives.terms import Pairs, Rows


@dataclass(frozen=True, kw_only=True)
class Tile:
    """rows: of the local samples; columns: of the global batch; ragged: whether some of each are not valid.

    excluded [r, c]: pairs that do not count among those of two samples, so also the matched ones; None: all count.
    matched: the part of the tile whose diagonal holds matched pairs, as rows and columns of the tile.
    """

    rows: slice
    columns: slice
    ragged: tuple[bool, bool]
    excluded: Tensor | None
    matched: tuple[slice, slice] | None


@dataclass(frozen=True, kw_only=True)
class PairGrid:
    """Local rows against global columns.

    own: the columns whose rows are local. items [N]: number of the item a sample is of; item_sizes [items]: how many
    valid samples an item has.
    """

    pairs: Pairs
    own: slice
    column_valid: Tensor
    items: Tensor
    item_sizes: Tensor

    @classmethod
    def over(cls, pairs: Pairs, world: World) -> PairGrid:
        """The grid of the samples of all ranks."""
        valid, ids = world.gather_rows(pairs.valid), world.gather_rows(pairs.ids)
        known, index = ids.unique(return_inverse=True)
        alone = ids == -1
        used, items = torch.where(alone, len(known) + alone.cumsum(0), index).unique(return_inverse=True)
        return cls(
            pairs=pairs,
            own=slice(world.rank * len(pairs.valid), (world.rank + 1) * len(pairs.valid)),
            column_valid=valid,
            items=items.to(torch.int32),
            item_sizes=items.new_zeros(len(used)).index_add(0, items, valid.to(items.dtype)),
        )

    @property
    def num_valid(self) -> Tensor:
        """Valid samples of the global batch: []"""
        return self.column_valid.sum()

    @property
    def num_others(self) -> Tensor:
        """With how many samples each local one is paired, itself left out: [n], 0 for an invalid one."""
        others = self.num_valid - self.item_sizes[self.items[self.own]]
        return torch.where(self.pairs.valid, others, torch.zeros_like(others))

    def unpack(self, tensors: Sequence[Tensor]) -> tuple[Rows, Rows, Rows]:
        """Rows, columns, scalars by name."""
        names = [*self.pairs.rows], [*self.pairs.columns], [*self.pairs.scalars]
        rest = iter(tensors)
        rows, columns, scalars = ({name: next(rest) for name in group} for group in names)
        return rows, columns, scalars

    def tiles(self) -> Iterator[Tile]:
        """All tiles, row by row."""
        valid, column_valid = self.pairs.valid, self.column_valid
        row_parts, column_parts = _parts(valid, self.pairs.tile), _parts(column_valid, self.pairs.tile)
        for rows, ragged_rows in row_parts:
            for columns, ragged_columns in column_parts:
                yield self._tile(rows, columns, (ragged_rows, ragged_columns))

    def _tile(self, rows: slice, columns: slice, ragged: tuple[bool, bool]) -> Tile:
        start = max(rows.start + self.own.start, columns.start)
        length = min(rows.stop + self.own.start, columns.stop) - start
        matched, excluded = None, None
        if length > 0:
            row, column = start - self.own.start - rows.start, start - columns.start
            matched = slice(row, row + length), slice(column, column + length)
        if matched is not None or len(self.item_sizes) < len(self.items):
            excluded = self.items[self.own][rows, None] == self.items[None, columns]
        if any(ragged):
            invalid = ~(self.pairs.valid[rows, None] & self.column_valid[None, columns])
            excluded = invalid if excluded is None else excluded | invalid
        return Tile(rows=rows, columns=columns, ragged=ragged, excluded=excluded, matched=matched)

    def cut(self, tile: Tile, rows: Rows, columns: Rows) -> tuple[Rows, Rows]:
        """The tile's rows and columns, zeros where they are not valid."""
        row_valid = self.pairs.valid[tile.rows] if tile.ragged[0] else None
        column_valid = self.column_valid[tile.columns] if tile.ragged[1] else None
        return (
            {name: _zero_unless(row_valid, tensor[tile.rows]) for name, tensor in rows.items()},
            {name: _zero_unless(column_valid, tensor[tile.columns]) for name, tensor in columns.items()},
        )


def _parts(valid: Tensor, size: int) -> list[tuple[slice, bool]]:
    """Consecutive parts of at most `size` samples, and whether a sample of them is not valid."""
    slices = [slice(start, min(start + size, len(valid))) for start in range(0, len(valid), size)]
    return [(part, not valid[part].all()) for part in slices]


def _zero_unless(valid: Tensor | None, tensor: Tensor) -> Tensor:
    if valid is None:
        return tensor
    return torch.where(valid.view(-1, *[1] * (tensor.ndim - 1)), tensor, torch.zeros_like(tensor))
