"""Rows against columns, exactly: the one place where samples of a global batch meet each other.

Each rank scores its own rows against the columns of all ranks, in tiles, so that every pair is scored once and no
[global, global] matrix exists. One pass serves both softmax directions: row statistics stay local, column statistics
(maximum, sum, count, sum of logits) are all-reduced. The backward pass scores the tiles again; gradients of the columns
return to their owners by a reduce-scatter. Sums are divided by the all-reduced count of valid samples, so ragged masks
on the ranks weigh every sample alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.collectives import ALONE, World
from pretrain.objectives.terms import Contrast, Rows, Term


@dataclass(frozen=True, kw_only=True)
class TermsValue:
    """local_loss: this rank's share, the sum over ranks is the loss.

    metrics: global scalars: `loss`, the value of each term, and how many samples took part in it.
    """

    local_loss: Tensor
    metrics: dict[str, Tensor]


def evaluate_terms(terms: Sequence[Term], world: World = ALONE) -> TermsValue:
    """Evaluate the terms of the local samples within the global batch.

    The gradient of `local_loss`, summed over ranks, is the gradient of the loss over the global batch, for whatever
    the terms' tensors were computed from. All ranks must pass the same kinds of terms in the same order.
    """
    shares: list[Tensor] = []
    counts: list[Tensor] = []
    for term in terms:
        values, valid = _contrast_losses(term, world) if isinstance(term, Contrast) else (term.values, term.valid)
        kept = torch.where(valid, values, torch.zeros_like(values))
        counts.append(world.sum(valid.sum().to(values.dtype)))
        shares.append(kept.sum() / counts[-1].clamp_min(1))
    totals = world.sum(torch.stack(shares))
    weights = totals.new_tensor([term.weight for term in terms])
    local_loss = torch.stack(
        [share * term.weight for term, share in zip(terms, shares, strict=True) if term.weight]
    ).sum()
    metrics = {term.name: total for term, total in zip(terms, totals, strict=True)}
    metrics |= {f"num_samples/{term.name}": n for term, n in zip(terms, counts, strict=True) if term.weight}
    return TermsValue(local_loss=local_loss, metrics={"loss": (weights * totals).sum(), **metrics})


def _contrast_losses(term: Contrast, world: World) -> tuple[Tensor, Tensor]:
    """Mean of the row and column cross entropies of each local sample [n], and which samples count [n]."""
    names = (tuple(term.rows), tuple(term.columns), tuple(term.scalars))
    columns = [world.gather_rows(tensor) for tensor in term.columns.values()]
    problem = _Problem(
        term=term,
        world=world,
        names=names,
        column_valid=world.gather_rows(term.valid),
        column_ids=world.gather_rows(term.ids),
    )
    tensors = [*term.rows.values(), *columns, *term.scalars.values()]
    row_losses, column_losses = _TiledCrossEntropy.apply(problem, term.positive, *tensors)
    return (row_losses + column_losses) / 2, term.valid


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """A contrast between local rows and global columns."""

    term: Contrast
    world: World
    names: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    column_valid: Tensor
    column_ids: Tensor

    def unpack(self, tensors: Sequence[Tensor]) -> tuple[Rows, Rows, Rows]:
        parts, start = [], 0
        for names in self.names:
            parts.append(dict(zip(names, tensors[start : start + len(names)], strict=True)))
            start += len(names)
        return parts[0], parts[1], parts[2]

    def tiles(self) -> list[tuple[slice, slice]]:
        num_rows, num_columns, tile = len(self.term.valid), len(self.column_valid), self.term.tile
        return [
            (slice(i, min(i + tile, num_rows)), slice(j, min(j + tile, num_columns)))
            for i in range(0, num_rows, tile)
            for j in range(0, num_columns, tile)
        ]

    @property
    def own(self) -> slice:
        """The columns whose rows are local."""
        num_rows = len(self.term.valid)
        return slice(self.world.rank * num_rows, (self.world.rank + 1) * num_rows)

    def negatives(self, rows: slice, columns: slice) -> Tensor:
        """[r, c]: both valid, not the same position, not the same id."""
        row_ids, column_ids = self.term.ids[rows, None], self.column_ids[None, columns]
        device = row_ids.device
        row_places = torch.arange(rows.start, rows.stop, device=device)[:, None] + self.own.start
        same_place = row_places == torch.arange(columns.start, columns.stop, device=device)[None]
        duplicate = (row_ids == column_ids) & (row_ids != -1)
        return self.term.valid[rows, None] & self.column_valid[None, columns] & ~same_place & ~duplicate


def _cut(tensors: Rows, part: slice) -> Rows:
    return {name: tensor[part] for name, tensor in tensors.items()}


class _Side:
    """Online log-sum-exp, sum and count of the negatives of each row, or of each column."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.maximum = like.new_full((size,), -torch.inf)
        self.sum_exp, self.sum_logits, self.count = (like.new_zeros(size) for _ in range(3))

    def add(self, part: slice, logits: Tensor, negatives: Tensor, dim: int) -> None:
        """Take in a tile; entries that are no negatives hold -inf. dim: the one that is reduced."""
        maximum = torch.maximum(self.maximum[part], logits.amax(dim))
        shift = torch.where(maximum.isinf(), torch.zeros_like(maximum), maximum)
        self.sum_exp[part] = self.sum_exp[part] * (self.maximum[part] - shift).exp() + (
            logits - shift.unsqueeze(dim)
        ).exp().sum(dim)
        self.maximum[part] = maximum
        self.sum_logits[part] += torch.where(negatives, logits, torch.zeros_like(logits)).sum(dim)
        self.count[part] += negatives.sum(dim)

    def reduce(self, world: World) -> None:
        """Combine what all ranks saw."""
        if world.size == 1:
            return
        maximum = world.max(self.maximum)
        shift = torch.where(maximum.isinf(), torch.zeros_like(maximum), maximum)
        sums = world.sum(torch.stack([self.sum_exp * (self.maximum - shift).exp(), self.sum_logits, self.count]))
        self.maximum, (self.sum_exp, self.sum_logits, self.count) = maximum, sums

    def log_sum_exp(self, positive: Tensor) -> Tensor:
        """Of the negatives and the positive."""
        return torch.logaddexp(self.sum_exp.log() + torch.nan_to_num(self.maximum, neginf=0.0), positive)

    def losses(self, lse: Tensor, positive: Tensor, smoothing: float) -> Tensor:
        """lse - (1 - smoothing) positive - smoothing * mean of all logits"""
        mean = (self.sum_logits + positive) / (self.count + 1)
        return lse - (1 - smoothing) * positive - smoothing * mean


class _TiledCrossEntropy(torch.autograd.Function):
    """(positive [n], rows [n, ...]..., columns [N, ...]..., scalars) -> row losses [n], column losses [n]."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, positive: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns, scalars = problem.unpack(tensors)
        by_row = _Side(len(positive), positive)
        by_column = _Side(len(problem.column_valid), positive)
        for row_part, column_part in problem.tiles():
            negatives = problem.negatives(row_part, column_part)
            logits = problem.term.score(_cut(rows, row_part), _cut(columns, column_part), scalars)
            logits = logits.masked_fill(~negatives, -torch.inf)
            by_row.add(row_part, logits, negatives, dim=1)
            by_column.add(column_part, logits, negatives, dim=0)
        by_column.reduce(problem.world)
        all_positive = problem.world.gather_rows(positive.detach())
        row_lse, column_lse = by_row.log_sum_exp(positive), by_column.log_sum_exp(all_positive)
        ctx.problem, ctx.counts = problem, (by_row.count, by_column.count)
        ctx.save_for_backward(positive, row_lse, column_lse, *tensors)
        smoothing = problem.term.label_smoothing
        column_losses = by_column.losses(column_lse, all_positive, smoothing)[problem.own]
        return by_row.losses(row_lse, positive, smoothing), column_losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        problem: _Problem = ctx.problem
        positive, row_lse, column_lse, *tensors = ctx.saved_tensors
        row_count, column_count = ctx.counts
        smoothing = problem.term.label_smoothing
        row_grad, own_column_grad = grads
        column_grad = problem.world.gather_rows(own_column_grad)
        sums = [torch.zeros_like(tensor) for tensor in tensors]
        row_sums, column_sums, scalar_sums = problem.unpack(sums)
        rows, columns, scalars = problem.unpack(tensors)
        for row_part, column_part in problem.tiles():
            with torch.enable_grad():
                leaves = [
                    {name: tensor.detach().requires_grad_() for name, tensor in group.items()}
                    for group in (_cut(rows, row_part), _cut(columns, column_part), scalars)
                ]
                logits = problem.term.score(*leaves)
            negatives = problem.negatives(row_part, column_part)
            logits_grad = _cross_entropy_grad(logits, row_lse[row_part, None], row_count[row_part, None], smoothing)
            logits_grad = logits_grad * row_grad[row_part, None]
            by_column = _cross_entropy_grad(
                logits, column_lse[None, column_part], column_count[None, column_part], smoothing
            )
            logits_grad = (logits_grad + by_column * column_grad[None, column_part]).masked_fill(~negatives, 0.0)
            flat = [leaf for group in leaves for leaf in group.values()]
            found = iter(torch.autograd.grad(logits, flat, logits_grad))
            for name in leaves[0]:
                row_sums[name][row_part] += next(found)
            for name in leaves[1]:
                column_sums[name][column_part] += next(found)
            for name in leaves[2]:
                scalar_sums[name] += next(found)
        own = problem.own
        positive_grad = row_grad * (_cross_entropy_grad(positive, row_lse, row_count, smoothing) - (1 - smoothing))
        positive_grad = positive_grad + own_column_grad * (
            _cross_entropy_grad(positive, column_lse[own], column_count[own], smoothing) - (1 - smoothing)
        )
        return None, positive_grad, *sums


def _cross_entropy_grad(logits: Tensor, lse: Tensor, num_negatives: Tensor, smoothing: float) -> Tensor:
    """Derivative of a cross entropy with respect to a logit that is not the target's."""
    return (logits.detach() - lse).exp() - smoothing / (num_negatives + 1)
