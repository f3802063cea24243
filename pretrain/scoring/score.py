"""What a score is made of: what it needs of each tuple, and how a tile of queries meets a tile of candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pretrain.scoring.names import ScoreName
from pretrain.scoring.side import Tuples

Factors = dict[str, Tensor]  # per-tuple tensors [n, ...] by name
BLOCK_ELEMENTS = 1 << 20  # of matrices [rows, columns, k, k] held at once: 8 MB of float64 stay in a cache


@dataclass(frozen=True, kw_only=True)
class Score:
    """prepare: what is computed once for a tuple. tile: factors of r queries and of c candidates -> [r, c]."""

    name: ScoreName
    prepare: Callable[[Tuples], Factors]
    tile: Callable[[Factors, Factors], Tensor]
    one_vector_a_side: bool = False
    needs_dims: bool = False  # at least as many dimensions as vectors


def num_rows_at_once(num_columns: int, elements_a_pair: int) -> int:
    """So many rows that their small matrices with all columns stay within `BLOCK_ELEMENTS`."""
    return max(1, BLOCK_ELEMENTS // max(1, num_columns * elements_a_pair))
