"""GRAM and PMRL evaluated in the manner of their published code: what `benchmarks.objectives` compares with.

Written from the formulas. Volumes: a [B, B, k, k] tensor of Gram matrices, `torch.det`, once for each direction. PMRL:
a full singular value decomposition of [B, D, k]. Gradients flow through everything (GRAM's own training stops them at
its gather), so that value and gradient can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def volumes(anchor: Tensor, others: list[Tensor]) -> Tensor:
    """[B, N]: sqrt |det| of the Gram matrix of each anchor with the others of each sample."""
    shape = (len(anchor), len(others[0]))
    own = (anchor * anchor).sum(dim=1)[:, None].expand(shape)
    cross = [anchor @ other.T for other in others]
    inner = [[(one * two).sum(dim=1)[None].expand(shape) for two in others] for one in others]
    first = torch.stack([own, *cross], dim=-1)
    rest = [torch.stack([along, *row], dim=-1) for along, row in zip(cross, inner, strict=True)]
    gram = torch.stack([first, *rest], dim=-2)
    return gram.float().det().abs().sqrt()


def volume_loss(vectors: list[Tensor], temperature: Tensor, smoothing: float) -> Tensor:
    """Mean of both cross entropies over -volume / temperature; vectors: the anchor first."""
    anchor, *others = vectors
    target = torch.arange(len(anchor), device=anchor.device)
    forward = -volumes(anchor, others) / temperature
    backward = -volumes(anchor, others).T / temperature  # the published step computes them again for this direction
    return (
        cross_entropy(forward, target, label_smoothing=smoothing)
        + cross_entropy(backward, target, label_smoothing=smoothing)
    ) / 2


def published_decomposition(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, and leading left vectors with their signs as they come, of [B, k, D]."""
    left, values, _ = torch.linalg.svd(matrices.transpose(1, 2), full_matrices=True)
    return values, left[:, :, 0]


def pmrl_losses(vectors: list[Tensor], value_temperature: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross entropy of the singular values for the first, and of leading left vectors, signs as they come."""
    values, leading = published_decomposition(torch.stack(vectors, dim=1))
    first = torch.zeros(len(values), dtype=torch.long, device=values.device)
    target = torch.arange(len(leading), device=leading.device)
    return cross_entropy(values / value_temperature, first), cross_entropy(leading @ leading.T / temperature, target)
