"""PMRL: a sample's modalities are aligned when their leading singular value carries all (arXiv 2507.17343).

M_i = [z_1 ... z_k] has singular values s_1 >= ... >= s_k and a leading left vector u_i, the direction its modalities
share. Two terms: the softmax of the singular values wants the first, and the u_i of different samples contrast. The
official code (model/pmrl.py at c3997e9) takes a full SVD, whose vectors have arbitrary signs (its contrast depends on
them) and whose gradient is NaN where singular values are equal; here a k x k eigendecomposition, a sign that is a
function of the sample, and gradients that need no gaps but s_1's.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data_pipeline.settings import UserError
from pretrain.objective_config import PmrlOptions
from pretrain.objectives.embeddings import Embeddings
from pretrain.objectives.gram_schmidt import ROUNDING, row_blocks
from pretrain.objectives.infonce import cosine_score
from pretrain.objectives.modalities import orientation, others_of
from pretrain.objectives.scores import Rows
from pretrain.objectives.terms import CrossEntropy, Objective, Pairs, PerSample, Term

Matrices = Float[Tensor, "samples modalities dim"]  # row m: modality m; rows of zeros: missing
GAP = 1e-6  # of s_1^2: below it u_1 has no derivative with respect to a turn towards u_j


class Pmrl(Objective):
    """w_values * mean_i[lse_m(s_im / tau_1) - s_i1 / tau_1] + w_contrast * CE(u_i . u_j / tau_2).

    Singular values of the modalities that a sample has, as many as those; samples with fewer than two are dropped. The
    contrast has one direction: its scores are symmetric. sign "anchor": u_i points to the anchor's side (where
    that is orthogonal or missing: to that of the first other modality by name); "free": (u_i . u_j)^2.

    Raises:
        UserError: `anchor` is not one of `modalities`; more modalities than dimensions.
    """

    def __init__(self, options: PmrlOptions, modalities: tuple[str, ...] | None = None) -> None:
        super().__init__(options, modalities)
        self.pmrl = options
        if modalities is not None:
            others_of(options.anchor, modalities, "pmrl")

    def terms(self, embeddings: Embeddings, scalars: dict[str, Tensor]) -> list[Term]:
        """Of values, of leading vectors, and the orientation hinge when it has a weight."""
        options = self.pmrl
        names = [options.anchor, *sorted(others_of(options.anchor, embeddings.vectors, "pmrl"))]
        matrices = torch.stack([embeddings.rows(name) for name in names], dim=1)
        there = torch.stack([embeddings.mask(name) for name in names], dim=1)
        if matrices.shape[2] < len(names):
            raise UserError(
                f"objective pmrl: {len(names)} modalities in {matrices.shape[2]} dimensions; expected dim >= modalities"
            )
        values, leading = leading_direction(matrices, there)
        valid = there.sum(dim=1) >= 2
        terms: list[Term] = [
            PerSample(
                name="pmrl/values",
                weight=options.weights.values,
                values=_softmax_loss(values / options.value_temperature, there.sum(dim=1)),
                valid=valid,
            ),
            CrossEntropy(
                name="pmrl/contrast",
                weight=options.weights.contrast,
                pairs=Pairs(
                    rows={"left": leading},
                    columns={"right": leading},
                    scalars={"scale": leading.new_tensor([1 / options.temperature])},
                    matched=leading.square().sum(dim=1) / options.temperature,
                    valid=valid,
                    ids=embeddings.sample_ids(),
                    score=cosine_score(options) if options.sign == "anchor" else sign_free_logits,
                    tile=options.tile,
                ),
                label_smoothing=options.label_smoothing,
                row_weight=1.0,
                column_weight=0.0,
            ),
        ]
        if options.orientation:
            terms.append(orientation(embeddings, valid, options.orientation, self.name))
        return terms


def _softmax_loss(logits: Float[Tensor, "samples modalities"], count: Tensor) -> Float[Tensor, " samples"]:
    """lse over the first `count` of each row, minus the first: as log(1 + sum of the rest), exact near 0."""
    rest = logits[:, 1:] - logits[:, :1]
    places = torch.arange(1, logits.shape[1], device=logits.device)
    there = places[None, :] < count[:, None]
    return torch.log1p(torch.where(there, rest, torch.full_like(rest, -torch.inf)).exp().sum(dim=1))


def leading_direction(
    matrices: Matrices, there: Bool[Tensor, "samples modalities"]
) -> tuple[Float[Tensor, "samples modalities"], Float[Tensor, "samples dim"]]:
    """Singular values, descending, and the leading unit vector, signed by the first modality that is not orthogonal to
    it; zeros for a sample without any. Rows where `there` is false are zero.
    """
    values, leading = _LeadingDirection.apply(matrices)
    assert isinstance(values, Tensor)
    assert isinstance(leading, Tensor)
    return values, leading


class _LeadingDirection(torch.autograd.Function):
    """[n, k, D] -> s [n, k], u_1 [n, D], from the k x k Gram matrix; v_m in column m. NaN in, NaN out.

    ds_m = u_m^T dM v_m, with u_m = 0 where s_m = 0. du_1 has a part 1 / (s_1^2 - s_j^2) towards each u_j, left out
    where the gap is below `GAP`, and one out of the span, 1 / s_1.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> tuple[Tensor, Tensor]:
        count, num_modalities, dim = matrices.shape
        leading = matrices.new_empty(count, dim)
        values, right = (
            matrices.new_empty(count, num_modalities),
            matrices.new_empty(count, num_modalities, num_modalities),
        )
        for part in row_blocks(matrices):
            own = matrices[part]
            gram = own @ own.transpose(1, 2)
            finite = gram.isfinite().all(dim=(1, 2), keepdim=True)  # eigh raises, on the rank that has the row alone
            vectors = torch.linalg.eigh(gram.where(finite, torch.zeros_like(gram)))[1].flip(-1)  # descending
            products = vectors.transpose(1, 2) @ own  # row m: s_m u_m
            lengths = torch.linalg.vector_norm(products, dim=2)
            if (lengths.diff(dim=1) > 0).any():  # equal ones may have come out of order by rounding
                lengths, order = lengths.sort(dim=1, descending=True)
                vectors = vectors.gather(2, order[:, None, :].expand_as(vectors))
                products = vectors.transpose(1, 2) @ own
            sign = _signs(vectors[:, :, 0])[:, None]
            leading[part] = products[:, 0] * (sign * _inverse(lengths)[:, :1])
            values[part], right[part] = lengths, vectors * sign[:, None]
        ctx.save_for_backward(matrices, values, right)
        return values, leading

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        matrices, values, right = ctx.saved_tensors  # [n, k, D], [n, k], [n, k, k (m)]
        found = torch.empty_like(matrices)
        for part in row_blocks(matrices):
            by_value, by_leading = grads[0][part], grads[1][part]
            lengths, vectors = values[part], right[part]
            first, inverse = lengths[:, :1], _inverse(lengths)
            products = vectors.transpose(1, 2) @ matrices[part]  # row m: s_m u_m
            along = (products @ by_leading[:, :, None]).squeeze(2) * inverse  # <g, u_m>
            gap = first.square() - lengths.square()
            apart = gap > GAP * first.square()
            turn = torch.where(apart, along / torch.where(apart, gap, 1), 0)  # column 0 has no gap
            # sum_m v_m (g_m u_m + c_m s_m u_1)^T + v_1 (sum_j c_j s_1 u_j + (g - sum_j <g, u_j> u_j) / s_1)^T
            weights = torch.diag_embed(by_value)
            weights[:, :, 0] += turn * lengths
            weights[:, 0] += turn * first - along * inverse[:, :1]
            mixed = (vectors @ weights * inverse[:, None]) @ products
            torch.addcmul(mixed, vectors[:, :, :1], (by_leading * inverse[:, :1])[:, None], out=found[part])
        return found


def _inverse(lengths: Float[Tensor, "samples modalities"]) -> Float[Tensor, "samples modalities"]:
    """1 / length; 0 where that is rounding: there is no direction."""
    usable = lengths > ROUNDING * torch.finfo(lengths.dtype).eps
    return torch.where(usable, 1 / torch.where(usable, lengths, 1), 0)


def _signs(first: Float[Tensor, "samples modalities"]) -> Float[Tensor, " samples"]:
    """Of the first entry of each row of v_1 that is not rounding: z_m . u_1 = s_1 v_1m."""
    large = first.abs() > 64 * torch.finfo(first.dtype).eps
    place = large.to(torch.int8).argmax(dim=1)
    return torch.where(first.gather(1, place[:, None]).squeeze(1) < 0, -1.0, 1.0).to(first.dtype)


def sign_free_logits(rows: Rows, columns: Rows, scalars: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
    """(u_i . u_j)^2 / tau_2"""
    return (rows["left"] @ columns["right"].T).square() * scalars["scale"]


OBJECTIVE = Pmrl
