"""Symile: contrast by the sum over dimensions of the product of all modalities (arXiv 2411.01053; code at d12e2c8).

Each modality in turn is the row; its own tuple of the others competes with other tuples: with every one ("all", the
code's n_squared for three modalities), or with as many as the rarest modality has samples, each modality shuffled
("shuffled", the code's n). The product of k unit vectors has a spread of D^(-(k-1)/2), so the scale begins at its
inverse.
"""

from __future__ import annotations

import math

from torch import Tensor

from pretrain.objective_config import SymileOptions
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.modalities import num_present
from pretrain.objectives.terms import Objective, Term, TupleCrossEntropy


class Symile(Objective):
    """Mean (or sum) over modalities of the cross entropy of the own tuple among candidates.

    Samples with fewer than two modalities are dropped; the term of a modality, those without it, too. A modality that a
    sample lacks is a factor of 1 in its own product, measured in the scale: 1 / sqrt(D) in each dimension where the
    scale is the default, 1 where it is given. The order of "shuffled" is a function of the ids of the global batch.
    """

    def __init__(self, options: SymileOptions, modalities: tuple[str, ...] | None = None) -> None:
        learned = {} if not options.learn_logit_scale else {"log_logit_scale": math.log(options.logit_scale or 1.0)}
        super().__init__(options, modalities, learned)
        self.symile = options

    def terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """One contrast a modality."""
        options = self.symile
        names = list(embeddings.vectors)
        rows = {name: embeddings.rows(name) for name in names}
        enough = num_present(embeddings) >= 2
        there = {name: embeddings.mask(name) & enough for name in names}
        like = rows[names[0]]
        dim = like.shape[1]
        fill = 1.0 if options.logit_scale else dim**-0.5
        return [
            TupleCrossEntropy(
                name=f"symile/{name}",
                weight=1.0,
                row=rows[name],
                valid=there[name],
                others={other: rows[other] for other in names if other != name},
                there={other: there[other] for other in names if other != name},
                fill=fill,
                ids=embeddings.sample_ids(),
                scale=self._scale(scalars, like) * fill ** (1 - len(names)),
                candidates=options.candidates,
                max_tuples=options.max_tuples,
                tile=options.tile,
                mean_over="modalities" if options.reduce == "mean" else "",
            )
            for name in names
        ]

    def learned_values(self, scalars: dict[str, Tensor]) -> dict[str, float]:
        """The logit scale; where none is given, its ratio to the default, which depends on the batch's modalities."""
        name = "logit_scale" if self.symile.logit_scale else "logit_scale_over_default"
        return {name: scalars["log_logit_scale"].exp().item()} if scalars else {}

    def _scale(self, scalars: dict[str, Tensor], like: Tensor) -> Tensor:
        """[1]: the logit scale, or its ratio to the default where none is given."""
        if "log_logit_scale" in scalars:
            return scalars["log_logit_scale"].to(like.dtype).exp()
        return like.new_tensor([self.symile.logit_scale or 1.0])


OBJECTIVE = Symile
