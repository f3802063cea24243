"""The encoders of a synthetic comparison: a small perceptron a modality, and what an objective wants to see of it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.compare.config import EncoderConfig
from pretrain.compare.generator import Samples
from pretrain.heads.projection import Projection
from pretrain.objectives.embeddings import Embeddings


class Encoders(nn.Module):
    """Vectors of each modality to unit rows [n, embedding_dim].

    independent: a second projection beside the first, for objectives that want one; it comes after all others, so that
    these are drawn alike with and without it.
    """

    def __init__(
        self, modalities: tuple[str, ...], observed_dim: int, sizes: EncoderConfig, *, independent: bool
    ) -> None:
        super().__init__()
        hidden, dim = sizes.hidden_dim, sizes.embedding_dim
        self.trunks = nn.ModuleDict({name: _perceptron(observed_dim, hidden) for name in modalities})
        self.projections = nn.ModuleDict({name: Projection(hidden, dim) for name in modalities})
        others = modalities if independent else ()
        self.independent = nn.ModuleDict({name: Projection(hidden, dim) for name in others})

    def forward(self, samples: Samples, *, augmented: bool) -> Embeddings:
        """Embeddings with the views that there are. augmented: also those of the second draws of noise."""
        outputs: dict[str, Tensor] = {}
        for suffix, group in (("", samples.observed), ("@augmented", samples.again if augmented else {})):
            for name, rows in group.items():
                features = self.trunks[name](rows)
                outputs[name + suffix] = self.projections[name](features)
                if self.independent:
                    outputs[f"{name}{suffix}@independent"] = self.independent[name](features)
        return Embeddings.of_outputs(outputs)

    @torch.no_grad()
    def embed(self, samples: Samples) -> dict[str, Float[Tensor, "samples dim"]]:
        """Embeddings by modality, without gradient."""
        return self(samples, augmented=False).vectors

    def freeze(self, modality: str) -> None:
        """Leave a modality's encoder as it is."""
        for part in (self.trunks, self.projections):
            part[modality].requires_grad_(False)


def _perceptron(observed_dim: int, hidden_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(observed_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU()
    )  # fmt: skip
