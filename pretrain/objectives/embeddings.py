"""What an objective sees of a batch: unit vectors by modality, and which of them are really there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data_pipeline.settings import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Embeddings of n samples.

    vectors: unit rows a modality. present: which rows count; None: all. ids: samples with equal ids are the same item
    and never negatives of each other; None: all different. views: further embeddings of the same samples by name.
    """

    vectors: dict[str, Float[Tensor, "samples dim"]]
    present: dict[str, Bool[Tensor, " samples"]] | None = None
    ids: Int[Tensor, " samples"] | None = None
    views: dict[str, Embeddings] | None = None

    @classmethod
    def of_outputs(
        cls, outputs: dict[str, Tensor], present: dict[str, Tensor] | None = None, ids: Tensor | None = None
    ) -> Embeddings:
        """From rows by `modality`, `modality@view`, `modality@view@view of the view`, as the model returns them."""
        vectors: dict[str, Tensor] = {}
        views: dict[str, dict[str, Tensor]] = {}
        for key, rows in outputs.items():
            modality, _, rest = key.partition("@")
            if not rest:
                vectors[modality] = rows
                continue
            view, _, inner = rest.partition("@")
            views.setdefault(view, {})[f"{modality}@{inner}" if inner else modality] = rows
        inside = {name: cls.of_outputs(group, present, ids) for name, group in views.items()}
        return cls(vectors=vectors, present=present, ids=ids, views=inside or None)

    def at_least_single(self) -> Embeddings:
        """The same, vectors of half precision as float32."""
        vectors = {name: rows if rows.dtype.itemsize >= 4 else rows.float() for name, rows in self.vectors.items()}
        views = None if self.views is None else {name: view.at_least_single() for name, view in self.views.items()}
        return replace(self, vectors=vectors, views=views)

    @property
    def num_samples(self) -> int:
        """Number of rows of every modality."""
        return next(iter(self.vectors.values())).shape[0]

    def mask(self, modality: str) -> Bool[Tensor, " samples"]:
        """Which rows of `modality` count: present, and not all zero (a zero row has no direction)."""
        vectors = self.vectors[modality].detach()
        nonzero = (vectors.amax(dim=1) != 0) | (vectors.amin(dim=1) != 0)  # also where one is no number
        return nonzero if self.present is None else nonzero & self.present[modality]

    def rows(self, modality: str) -> Float[Tensor, "samples dim"]:
        """Vectors with zeros where they do not count: nothing behind a false mask, NaN included, has an effect."""
        vectors, mask = self.vectors[modality], self.mask(modality)
        if mask.all():
            return vectors
        return torch.where(mask[:, None], vectors, torch.zeros((), dtype=vectors.dtype, device=vectors.device))

    def view(self, name: str, wanted_by: str) -> Embeddings:
        """Further embeddings of the same samples.

        Raises:
            UserError: there are none of that name.
        """
        if self.views is None or name not in self.views:
            raise UserError(
                f"objective {wanted_by}: it needs the {name} view of every sample; {nearest(name, self.views or {})}"
            )
        return self.views[name]

    def sample_ids(self) -> Int[Tensor, " samples"]:
        """The ids, or -1 for "all different"."""
        device = next(iter(self.vectors.values())).device
        return torch.full((self.num_samples,), -1, device=device) if self.ids is None else self.ids.to(device)
