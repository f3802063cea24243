"""Which pairs a tile of scores holds, and which of them count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pretrain.collectives import World
from pretrain.objectives.terms import Pairs, Rows

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """rows: of the local samples; columns: of the global batch.

    row_valid [r], column_valid [c]: None where all are. matched: the part of the tile whose diagonal holds matched
    pairs, as rows and columns of the tile. repeated: row and column of each further pair of two samples of one item.
    Pairs of invalid samples, matched pairs and those of one item are excluded: they do not count among the pairs of two
    samples.
    """

    rows: slice
    columns: slice
    row_valid: Tensor | None
    column_valid: Tensor | None
    matched: tuple[slice, slice] | None
    repeated: tuple[Tensor, Tensor] | None

    @property
    def counts_all(self) -> bool:
        """Whether no pair is excluded."""
        return all(part is None for part in (self.row_valid, self.column_valid, self.matched, self.repeated))

    def zero_excluded_(self, values: Tensor) -> Tensor:
        """Put 0 in place of the excluded ones of finite values [r, c]."""
        if self.matched is not None:
            values[self.matched].diagonal().zero_()
        if self.repeated is not None:
            values[self.repeated] = 0
        if self.row_valid is not None:
            values *= self.row_valid[:, None].to(values.dtype)
        if self.column_valid is not None:
            values *= self.column_valid.to(values.dtype)
        return values

    def excluded(self, like: Tensor) -> Tensor:
        """Bool [r, c] for values [r, c]."""
        return self.zero_excluded_(torch.ones_like(like, dtype=torch.float32)) == 0


@dataclass(frozen=True, kw_only=True)
class PairGrid:
    """Local rows against global columns.

    own: the columns whose rows are local. items [N]: number of the item a sample is of; item_sizes [items]: how many
    valid samples an item has; has_repeats: whether one has several.
    """

    pairs: Pairs
    own: slice
    column_valid: Tensor
    items: Tensor
    item_sizes: Tensor
    has_repeats: bool

    @classmethod
    def over(cls, pairs: Pairs, world: World) -> PairGrid:
        """The grid of the samples of all ranks."""
        valid, ids = world.gather_rows(pairs.valid), world.gather_rows(pairs.ids)
        known, index = ids.unique(return_inverse=True)
        alone = ids == -1
        used, items = torch.where(alone, len(known) + alone.cumsum(0), index).unique(return_inverse=True)
        item_sizes = items.new_zeros(len(used)).index_add(0, items, valid.to(items.dtype))
        return cls(
            pairs=pairs,
            own=slice(world.rank * len(pairs.valid), (world.rank + 1) * len(pairs.valid)),
            column_valid=valid,
            items=items.to(torch.int32),
            item_sizes=item_sizes,
            has_repeats=bool((item_sizes > 1).any()),
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

    def unpack(self, values: Sequence[Value]) -> tuple[dict[str, Value], dict[str, Value], dict[str, Value]]:
        """Rows, columns, scalars by name."""
        names = [*self.pairs.rows], [*self.pairs.columns], [*self.pairs.scalars]
        rest = iter(values)
        rows, columns, scalars = ({name: next(rest) for name in group} for group in names)
        return rows, columns, scalars

    def tiles(self) -> Iterator[Tile]:
        """All tiles, row by row."""
        valid, column_valid = self.pairs.valid, self.column_valid
        row_parts, column_parts = _parts(valid, self.pairs.tile), _parts(column_valid, self.pairs.tile)
        for rows, rows_valid in row_parts:
            for columns, columns_valid in column_parts:
                yield self._tile(rows, columns, (rows_valid, columns_valid))

    def _tile(self, rows: slice, columns: slice, all_valid: tuple[bool, bool]) -> Tile:
        start = max(rows.start + self.own.start, columns.start)
        length = min(rows.stop + self.own.start, columns.stop) - start
        matched = None
        if length > 0:
            row, column = start - self.own.start - rows.start, start - columns.start
            matched = slice(row, row + length), slice(column, column + length)
        return Tile(
            rows=rows,
            columns=columns,
            row_valid=None if all_valid[0] else self.pairs.valid[rows],
            column_valid=None if all_valid[1] else self.column_valid[columns],
            matched=matched,
            repeated=self._repeated(rows, columns) if self.has_repeats else None,
        )

    def _repeated(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor] | None:
        row_items, column_items = self.items[self.own][rows], self.items[columns]
        some_rows = (self.item_sizes[row_items] > 1).nonzero().flatten()
        some_columns = (self.item_sizes[column_items] > 1).nonzero().flatten()
        row, column = (row_items[some_rows, None] == column_items[None, some_columns]).nonzero().unbind(1)
        return (some_rows[row], some_columns[column]) if len(row) else None

    def cut(self, tile: Tile, rows: Rows, columns: Rows) -> tuple[Rows, Rows]:
        """The tile's rows and columns, zeros where they are not valid."""
        return (
            {name: _zero_unless(tile.row_valid, tensor[tile.rows]) for name, tensor in rows.items()},
            {name: _zero_unless(tile.column_valid, tensor[tile.columns]) for name, tensor in columns.items()},
        )


def _parts(valid: Tensor, size: int) -> list[tuple[slice, bool]]:
    """Consecutive parts of at most `size` samples, and whether all of them are valid."""
    slices = [slice(start, min(start + size, len(valid))) for start in range(0, len(valid), size)]
    return [(part, bool(valid[part].all())) for part in slices]


def _zero_unless(valid: Tensor | None, tensor: Tensor) -> Tensor:
    if valid is None:
        return tensor
    return torch.where(valid.view(-1, *[1] * (tensor.ndim - 1)), tensor, torch.zeros_like(tensor))
