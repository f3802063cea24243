"""Scores of a tile of rows and columns whose gradients are written out: no autograd graph a tile, nothing kept twice.

An objective names one of these in its `Pairs`; any other function of rows, columns and scalars goes through autograd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Rows = dict[str, Tensor]  # per-sample tensors [n, ...] by name
Sums = dict[str, Tensor | None]  # gradients to add to, by name; None: not wanted
Scores = Float[Tensor, "rows columns"]
NegativesPrecision = Literal["float32", "bfloat16"]
BFLOAT16_FLOOR = (
    2.0**-10
)  # of a squared distance: its gradient holds a product over the distance, 6 % wrong at most here


@dataclass(frozen=True, kw_only=True)
class TileScore(ABC):
    """A score and its gradient.

    negatives_precision: of the factors of the matrix products of pairs, sums staying in the dtype of the vectors;
    "float32" means the vectors as they are. Matched scores are given apart (`Pairs.matched`), at full precision.
    kernel: "auto" takes the fused one where it can run (`pretrain.kernels.choice`), "pytorch" never.
    """

    negatives_precision: NegativesPrecision = "float32"
    kernel: Literal["auto", "pytorch"] = "auto"

    def __call__(self, rows: Rows, columns: Rows, scalars: Rows) -> Scores:
        """The scores alone, without a gradient."""
        with torch.no_grad():
            return self.forward(rows, columns, scalars)[0]

    @abstractmethod
    def forward(self, rows: Rows, columns: Rows, scalars: Rows) -> tuple[Scores, tuple[Tensor, ...]]:
        """Scores, and what `backward` wants of this pass."""

    @abstractmethod
    def backward(
        self, kept: tuple[Tensor, ...], grad: Scores, tile: tuple[Rows, Rows, Rows], sums: tuple[Sums, Sums, Sums]
    ) -> None:
        """Add the gradients of the tile's rows, columns and scalars to `sums`; may write over `kept` and `grad`."""

    def factor(self, vectors: Tensor) -> Tensor:
        """A factor of a matrix product at the precision asked for."""
        return vectors if self.negatives_precision == "float32" else vectors.bfloat16().to(vectors.dtype)


@dataclass(frozen=True, kw_only=True)
class CosineScore(TileScore):
    """<left_i, right_j> * scale, and + bias where there is one.

    rows: {"left": [r, D]}; columns: {"right": [c, D]}; scalars: {"scale": [1]} and maybe {"bias": [1]}.
    """

    def forward(self, rows: Rows, columns: Rows, scalars: Rows) -> tuple[Scores, tuple[Tensor, ...]]:
        """One matrix product."""
        products = self.factor(rows["left"]) @ self.factor(columns["right"]).T
        scores = products * scalars["scale"]
        if "bias" in scalars:
            scores += scalars["bias"]
        return scores, (products,)

    def backward(
        self, kept: tuple[Tensor, ...], grad: Scores, tile: tuple[Rows, Rows, Rows], sums: tuple[Sums, Sums, Sums]
    ) -> None:
        """Two matrix products."""
        (rows, columns, scalars), (row_sums, column_sums, scalar_sums) = tile, sums
        if (scale := scalar_sums["scale"]) is not None:
            scale += torch.dot(kept[0].flatten(), grad.flatten())
        if (bias := scalar_sums.get("bias")) is not None:
            bias += grad.sum()
        slope = self.factor(grad.mul_(scalars["scale"]))
        if (left := row_sums["left"]) is not None:
            left.addmm_(slope, self.factor(columns["right"]))
        if (right := column_sums["right"]) is not None:
            right.addmm_(slope.T, self.factor(rows["left"]))


@dataclass(frozen=True, kw_only=True)
class VolumeScore(TileScore):
    """-scale * volume_j * sqrt(square_i - sum_m <anchor_i, axis^m_j>^2): minus a tuple's volume over a temperature.

    rows: {"anchor": [r, D], "square": [r], its squared length}; columns: {"volume": [c], "axis 0": [c, D], ...}, the
    axes of a column orthonormal or zero; scalars: {"scale": [1]}. Where the root is within rounding of 0 it is 0, and
    so is its gradient.
    """

    def forward(self, rows: Rows, columns: Rows, scalars: Rows) -> tuple[Scores, tuple[Tensor, ...]]:
        """One matrix product an axis."""
        anchor = self.factor(rows["anchor"])
        products = [anchor @ self.factor(columns[name]).T for name in axis_names(columns)]
        distances = torch.addcmul(rows["square"][:, None], products[0], products[0], value=-1)
        for product in products[1:]:
            distances.addcmul_(product, product, value=-1)
        distances = torch.threshold_(distances, self.floor(distances.dtype), 0.0).sqrt_()
        return distances * (columns["volume"] * -scalars["scale"]), (distances, *products)

    def floor(self, dtype: torch.dtype) -> float:
        """Squared distances up to this are rounding of the products."""
        return 4 * torch.finfo(dtype).eps if self.negatives_precision == "float32" else BFLOAT16_FLOOR

    def backward(
        self, kept: tuple[Tensor, ...], grad: Scores, tile: tuple[Rows, Rows, Rows], sums: tuple[Sums, Sums, Sums]
    ) -> None:
        """Two matrix products an axis."""
        (rows, columns, scalars), (row_sums, column_sums, scalar_sums) = tile, sums
        distances, *products = kept
        weight = columns["volume"] * scalars["scale"]
        slope = grad.mul_(distances)
        by_column = slope.sum(dim=0)
        if (volume := column_sums["volume"]) is not None:
            volume -= by_column * scalars["scale"]
        if (scale := scalar_sums["scale"]) is not None:
            scale -= torch.dot(by_column, columns["volume"])
        # grad / distance as (grad * distance) / distance^2: 0 where the distance is 0, by a bound instead of a mask
        slope.div_(distances.square_().clamp_min_(self.floor(distances.dtype))).mul_(weight)
        if (square := row_sums["square"]) is not None:
            square.sub_(slope.sum(dim=1), alpha=0.5)
        anchor, by_anchor = self.factor(rows["anchor"]), row_sums["anchor"]
        for name, product in zip(axis_names(columns), products, strict=True):
            by_product = self.factor(product.mul_(slope))
            if by_anchor is not None:
                by_anchor.addmm_(by_product, self.factor(columns[name]))
            if (axis := column_sums[name]) is not None:
                axis.addmm_(by_product.T, anchor)


def part_of(sums: Sums, part: slice) -> Sums:
    """The sums of some of the rows."""
    return {name: None if total is None else total[part] for name, total in sums.items()}


def axis_names(columns: dict[str, Any]) -> list[str]:
    """Keys of the axes among the columns of a volume."""
    return [name for name in columns if name.startswith("axis ")]
