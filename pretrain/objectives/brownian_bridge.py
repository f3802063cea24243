"""Brownian bridge: an augmented view lies on the way from one modality to the other (arXiv 2303.05952, section 3.3).

Of a pair (V, T): mean_j |z_Vj^a - mu_j|^2 with mu = (t z_V + (1 - t) z_T) / |t z_V + (1 - t) z_T| and t fixed. The
ratio that the paper prints beside it is not equal to it.
"""

from __future__ import annotations

from torch import Tensor

from pretrain.objective_config import BrownianBridgeOptions
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.modalities import modality_pairs, side, unit
from pretrain.objectives.terms import Objective, PerSample, Term


class BrownianBridge(Objective):
    """Sum (or mean) over pairs of the squared distance of the first modality's augmented view to the bridge.

    With `anchor`, the first is each other modality and the second the anchor. Needs the view "augmented".

    Raises:
        UserError: a pair or the anchor names no modality; the view is missing.
    """

    def __init__(self, options: BrownianBridgeOptions, modalities: tuple[str, ...] | None = None) -> None:
        super().__init__(options, modalities)
        self.bridge = options
        if modalities is not None:
            modality_pairs(options, modalities, self.name)

    def terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """One term a pair."""
        augmented = embeddings.view("augmented", self.name)
        return [self._term(embeddings, augmented, first, second) for first, second in self._pairs(embeddings)]

    def _pairs(self, embeddings: Embeddings) -> list[tuple[str, str]]:
        pairs = modality_pairs(self.bridge, embeddings.vectors, self.name)
        return pairs if self.bridge.anchor is None else [(other, anchor) for anchor, other in pairs]

    def _term(self, embeddings: Embeddings, augmented: Embeddings, first: str, second: str) -> PerSample:
        (start, start_valid), (end, end_valid) = side(embeddings, first), side(embeddings, second)
        view, view_valid = side(augmented, first)
        position = self.bridge.position
        middle, has_direction = unit(position * start + (1 - position) * end)
        return PerSample(
            name=f"brownian_bridge/{first}-{second}",
            weight=1.0,
            values=view.square().sum(dim=1) + middle.square().sum(dim=1) - 2 * (view * middle).sum(dim=1),
            valid=start_valid & end_valid & view_valid & has_direction,
            mean_over="" if self.bridge.reduce == "sum" else "pairs",
        )


OBJECTIVE = BrownianBridge
