"""What a mask over the steps of a sample (frames, tokens) means to every tower."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def at_least_one(mask: Bool[Tensor, "samples steps"]) -> Bool[Tensor, "samples steps"]:
    """`mask`, with the first step of empty rows set, so that no softmax and no mean runs over nothing.

    The caller replaces what `mask` hides by a constant first: an empty row then attends to a constant.
    """
    first = torch.zeros_like(mask)
    first[:, 0] = True
    return mask | (first & ~mask.any(dim=1, keepdim=True))


def masked_mean(
    values: Float[Tensor, "samples steps features"], mask: Bool[Tensor, "samples steps"]
) -> Float[Tensor, "samples features"]:
    """Mean over the steps that count, in float32; zero where none does."""
    kept = torch.where(mask[:, :, None], values.float(), torch.zeros((), device=values.device))
    return kept.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1)
