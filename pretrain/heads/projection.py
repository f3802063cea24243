"""From an encoder's features to embeddings: a linear map, then unit length, always in float32."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Projection(nn.Module):
    """[n, width] -> [n, dim], fp32 unit rows. A row of zeros stays zero and passes no gradient."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim, bias=False)

    def forward(self, features: Float[Tensor, "samples width"]) -> Float[Tensor, "samples dim"]:
        """Project and normalise, outside of autocast."""
        with torch.autocast(features.device.type, enabled=False):
            rows = self.linear(features.float())
            squared = rows.square().sum(dim=1, keepdim=True)
            usable = ~(squared <= torch.finfo(torch.float32).tiny)  # not-a-number stays one: it is no missing row
            length = torch.where(usable, squared, torch.ones_like(squared)).sqrt()
            return torch.where(usable, rows / length, torch.zeros_like(rows))
