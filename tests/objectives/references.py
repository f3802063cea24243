"""Every objective once more, in float64, straight from its formula: loops over samples, matrices in full, no tricks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.objectives import Embeddings


@dataclass(frozen=True, kw_only=True)
class Case:
    """Samples as a reference sees them. vectors: {modality: [n, D]}; present: {modality: [n]}; ids [n], all >= 0."""

    vectors: dict[str, Tensor]
    present: dict[str, Tensor]
    ids: Tensor
    augmented: dict[str, Tensor]
    independent: dict[str, Tensor]
    independent_augmented: dict[str, Tensor]

    @property
    def names(self) -> list[str]:
        return list(self.vectors)

    @property
    def count(self) -> int:
        return len(self.ids)

    def has(self, i: int, *names: str) -> bool:
        return all(bool(self.present[name][i]) for name in names)

    def mine(self, i: int) -> list[str]:
        """Modalities of sample i."""
        return [name for name in self.names if self.present[name][i]]

    def enough(self) -> list[int]:
        """Samples with at least two modalities."""
        return [i for i in range(self.count) if len(self.mine(i)) >= 2]

    def leaves(self) -> list[Tensor]:
        """All tensors that may have a gradient."""
        groups = (self.vectors, self.augmented, self.independent, self.independent_augmented)
        return [tensor for group in groups for tensor in group.values()]

    def embeddings(self) -> Embeddings:
        """The same as an objective takes it."""

        def of(vectors: dict[str, Tensor], views: dict[str, Embeddings] | None = None) -> Embeddings:
            return Embeddings(vectors=vectors, present=self.present, ids=self.ids, views=views)

        augmented = of(self.augmented, {"independent": of(self.independent_augmented)})
        return of(self.vectors, {"augmented": augmented, "independent": of(self.independent)})


Reference = Callable[..., Tensor]
Temperature = Tensor | float


def zero(case: Case) -> Tensor:
    return next(iter(case.vectors.values())).sum() * 0


def side(case: Case, name: str, i: int) -> Tensor | None:
    """Of sample i: a modality, or for "video+audio" the unit vector along the sum of what it has; None: nothing."""
    mine = [case.vectors[one][i] for one in name.split("+") if case.has(i, one)]
    if not mine:
        return None
    total = torch.stack(mine).sum(0)
    return total / total.norm() if "+" in name else total


def cross_entropy(logits: Tensor, ids: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over rows; another sample of the row's item is no candidate."""
    allowed = (ids[:, None] != ids[None, :]) | torch.eye(len(ids), dtype=torch.bool)
    losses = []
    for i, row in enumerate(logits):
        kept = row[allowed[i]]
        losses.append(kept.logsumexp(0) - (1 - smoothing) * row[i] - smoothing * kept.mean())
    return torch.stack(losses).mean()


def both_ways(logits: Tensor, ids: Tensor, smoothing: float = 0.0) -> Tensor:
    return (cross_entropy(logits, ids, smoothing) + cross_entropy(logits.T, ids, smoothing)) / 2


def gram_determinant(vectors: Sequence[Tensor]) -> Tensor:
    matrix = torch.stack(list(vectors))
    return (matrix @ matrix.T).det()


def orientation(case: Case, kept: list[int]) -> Tensor:
    values = []
    for i in kept:
        pairs = itertools.combinations(case.mine(i), 2)
        cosines = torch.stack([case.vectors[a][i] @ case.vectors[b][i] for a, b in pairs])
        values.append(torch.relu(-cosines).sum())
    return torch.stack(values).mean() if values else zero(case)


def gram(
    case: Case,
    *,
    anchor: str = "text",
    temperature: Temperature,
    label_smoothing: float = 0.1,
    orientation_weight: float = 0,
) -> Tensor:
    others = [name for name in case.names if name != anchor]
    kept = [i for i in case.enough() if case.has(i, anchor)]
    if not kept:
        return zero(case)

    def volume(i: int, j: int) -> Tensor:
        vectors = [case.vectors[anchor][i], *(case.vectors[m][j] for m in others if case.has(j, m))]
        return gram_determinant(vectors).clamp_min(0).sqrt()

    logits = torch.stack([torch.stack([-volume(i, j) / temperature for j in kept]) for i in kept])
    value = both_ways(logits, case.ids[kept], label_smoothing)
    return value + orientation_weight * orientation(case, kept) if orientation_weight else value


def triangle(case: Case, *, anchor: str = "text", temperature: Temperature, label_smoothing: float = 0.1) -> Tensor:
    others = [name for name in case.names if name != anchor]
    kept = [i for i in case.enough() if case.has(i, anchor)]
    if not kept:
        return zero(case)

    def area(i: int, j: int) -> Tensor:
        sides = [case.vectors[anchor][i] - case.vectors[m][j] for m in others if case.has(j, m)]
        return gram_determinant(sides) / 2

    logits = torch.stack([torch.stack([-area(i, j) / temperature for j in kept]) for i in kept])
    return both_ways(logits, case.ids[kept], label_smoothing)


def pairs_of(case: Case, pairs: str | list[tuple[str, str]], anchor: str | None) -> list[tuple[str, str]]:
    if anchor is not None:
        return [(anchor, name) for name in case.names if name != anchor]
    return list(itertools.combinations(case.names, 2)) if pairs == "all" else list(pairs)


def with_both(case: Case, a: str, b: str) -> list[int]:
    return [i for i in range(case.count) if side(case, a, i) is not None and side(case, b, i) is not None]


def sides(case: Case, name: str, kept: list[int]) -> Tensor:
    return torch.stack([rows for i in kept if (rows := side(case, name, i)) is not None])


def over_pairs(
    case: Case,
    one: Callable[[str, str, list[int]], Tensor],
    pairs: str | list[tuple[str, str]] = "all",
    anchor: str | None = None,
    reduce: str = "sum",
) -> Tensor:
    found = [one(a, b, kept) for a, b in pairs_of(case, pairs, anchor) if (kept := with_both(case, a, b))]
    if not found:
        return zero(case)
    return torch.stack(found).sum() / (len(found) if reduce == "mean" else 1)


def infonce(
    case: Case, *, temperature: Temperature, label_smoothing: float = 0.0, within: float = 0.0, **pairs: str | None
) -> Tensor:
    def one(a: str, b: str, kept: list[int]) -> Tensor:
        logits = sides(case, a, kept) @ sides(case, b, kept).T / temperature
        value = both_ways(logits, case.ids[kept], label_smoothing)
        for name in (a, b) if within else ():
            logits = case.vectors[name][kept] @ case.augmented[name][kept].T / temperature
            value = value + within / 2 * cross_entropy(logits, case.ids[kept], label_smoothing)
        return value

    return over_pairs(case, one, **pairs)


def sigmoid(case: Case, *, temperature: Temperature, bias: Tensor | float = -10.0, **pairs: str | None) -> Tensor:
    def one(a: str, b: str, kept: list[int]) -> Tensor:
        total, left, right = zero(case), sides(case, a, kept), sides(case, b, kept)
        place = {i: number for number, i in enumerate(kept)}
        for i, j in itertools.product(kept, kept):
            if i == j or case.ids[i] != case.ids[j]:
                logit = left[place[i]] @ right[place[j]] / temperature + bias
                total = total - torch.nn.functional.logsigmoid(logit if i == j else -logit)
        return total / len(kept)

    return over_pairs(case, one, **pairs)


def symile(
    case: Case,
    *,
    logit_scale: float | None = None,
    ratio: Tensor | float = 1.0,
    reduce: str = "mean",
    candidates: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> Tensor:
    """candidates: of each row's modality, samples of the others in the order of their names; None: all tuples.
    ratio: of the scale to the default one."""
    enough = set(case.enough())
    known = [name for name in case.names if any(case.has(i, name) for i in enough)]
    dim = next(iter(case.vectors.values())).shape[1]
    terms = []
    for anchor in known:
        others = [name for name in known if name != anchor]
        places = [[i for i in sorted(enough) if case.has(i, name)] for name in others]
        scale = logit_scale or ratio * math.sqrt(dim ** (len(known) - 1))
        fill = 1.0 if logit_scale else dim**-0.5
        losses = []
        for i in [i for i in sorted(enough) if case.has(i, anchor)]:
            row = case.vectors[anchor][i]
            own = row
            for name in others:
                own = own * (case.vectors[name][i] if case.has(i, name) else fill)
            scores = [own.sum() * scale]
            for members in itertools.product(*places) if candidates is None else candidates[anchor]:
                if all(case.ids[j] == case.ids[i] for j in members):
                    continue
                product = row
                for name, j in zip(others, members, strict=True):
                    product = product * case.vectors[name][j]
                scores.append(product.sum() * scale)
            losses.append(torch.stack(scores).logsumexp(0) - scores[0])
        terms.append(torch.stack(losses).mean())
    if not terms:
        return zero(case)
    return torch.stack(terms).sum() / (len(terms) if reduce == "mean" else 1)


def pmrl(
    case: Case,
    *,
    anchor: str = "text",
    value_temperature: float = 0.05,
    temperature: float = 0.1,
    sign: str = "anchor",
    label_smoothing: float = 0.0,
    weights: Mapping[str, float] | None = None,
    orientation_weight: float = 0.0,
) -> Tensor:
    """By a full SVD; needs singular values that differ."""
    weight = {"values": 1.0, "contrast": 1.0} | dict(weights or {})
    kept = case.enough()
    if not kept:
        return zero(case)
    values, leading = [], []
    for i in kept:
        mine = sorted(case.mine(i), key=lambda name: (name != anchor, name))
        matrix = torch.stack([case.vectors[name][i] for name in mine], dim=1)  # [D, k]
        u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
        values.append((s / value_temperature).logsumexp(0) - s[0] / value_temperature)
        direction = u[:, 0]
        towards = next(c for name in mine if abs(c := float((direction @ case.vectors[name][i]).detach())) > 1e-12)
        leading.append(direction * (1.0 if towards > 0 else -1.0))
    rows = torch.stack(leading)
    cosines = rows @ rows.T
    logits = (cosines if sign == "anchor" else cosines.square()) / temperature
    value = weight["values"] * torch.stack(values).mean()
    value = value + weight["contrast"] * cross_entropy(logits, case.ids[kept], label_smoothing)
    return value + orientation_weight * orientation(case, kept) if orientation_weight else value


def centroid(case: Case, i: int) -> Tensor:
    return torch.stack([case.vectors[name][i] for name in case.mine(i)]).mean(0)


def centrobind(
    case: Case,
    *,
    temperature: Temperature,
    normalize: bool = False,
    stop_gradient: bool = False,
    label_smoothing: float = 0.0,
    reduce: str = "sum",
) -> Tensor:
    terms = []
    for name in case.names:
        kept = [i for i in case.enough() if case.has(i, name)]
        if not kept:
            continue
        middles = torch.stack([centroid(case, i) for i in kept])
        if normalize:
            middles = middles / middles.norm(dim=1, keepdim=True)
        if stop_gradient:
            middles = middles.detach()
        logits = middles @ case.vectors[name][kept].T / temperature
        terms.append(2 * both_ways(logits, case.ids[kept], label_smoothing))
    if not terms:
        return zero(case)
    return torch.stack(terms).sum() / (len(terms) if reduce == "mean" else 1)


def kernel_matrix(rows: Tensor, ids: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """exp(-sharpness |x_i - x_j|^2), and which pairs count: another sample of the same item does not."""
    distances = (rows[:, None] - rows[None]).square().sum(2)
    counted = (ids[:, None] != ids[None]) | torch.eye(len(ids), dtype=torch.bool)
    return torch.exp(-sharpness * distances), counted


def uniformity(rows: Tensor, ids: Tensor, width: float, form: str) -> Tensor:
    kernel, counted = kernel_matrix(rows, ids, 1 / (2 * width**2))
    if form == "joint":
        return kernel[counted].mean().log()
    return torch.stack([kernel[i][counted[i]].mean().log() for i in range(len(ids))]).mean()


def unialign(
    case: Case,
    *,
    anchor: str = "video",
    uniformity_form: str = "joint",
    kernel_width: float = 0.5,
    centroid_width: float = 0.5,
    weights: Mapping[str, float] | None = None,
) -> Tensor:
    weight = dict.fromkeys(("uniformity", "alignment", "volume", "centroid"), 1.0) | dict(weights or {})
    kept = [i for i in case.enough() if case.has(i, anchor)]
    if not kept:
        return zero(case)
    value = zero(case)
    for name in case.names:
        own = [i for i in kept if case.has(i, name)]
        if own:
            spread = uniformity(case.vectors[name][own], case.ids[own], kernel_width, uniformity_form)
            value = value + weight["uniformity"] * spread
    distances, volumes = [], []
    for i in kept:
        others = [name for name in case.mine(i) if name != anchor]
        squares = [(case.vectors[anchor][i] - case.vectors[name][i]).square().sum() for name in others]
        distances.append(torch.stack(squares).mean())
        volumes.append(gram_determinant([case.vectors[name][i] for name in case.mine(i)]))
    value = value + weight["alignment"] * torch.stack(distances).mean() + weight["volume"] * torch.stack(volumes).mean()
    middles = torch.stack([centroid(case, i) for i in kept])
    return value + weight["centroid"] * uniformity(middles, case.ids[kept], centroid_width, uniformity_form)


def divergence(case: Case, *, anchor: str = "video", kernel_width: float = 0.5) -> Tensor:
    """(1 / k) sum_m log int p_m^k - log int prod_m p_m: an integral of p_m f is the mean of f over its samples."""
    kept = [i for i in range(case.count) if case.has(i, *case.names)]
    ids = case.ids[kept]
    counted = (ids[:, None] != ids[None]) | torch.eye(len(kept), dtype=torch.bool)

    def density(at: str, of: str) -> Tensor:
        distances = (case.vectors[at][kept][:, None] - case.vectors[of][kept][None]).square().sum(2)
        kernel = torch.exp(-distances / (2 * kernel_width**2))
        return torch.stack([row[own].mean() for row, own in zip(kernel, counted, strict=True)])

    k = len(case.names)
    powers = [density(name, name).pow(k - 1).mean().log() for name in case.names]
    others = torch.stack([density(anchor, name) for name in case.names if name != anchor])
    return torch.stack(powers).mean() - others.prod(0).mean().log()


def feature_separation(
    case: Case,
    *,
    temperature: Temperature,
    uniformity_t: float = 2.0,
    weights: Mapping[str, float] | None = None,
    reduce: str = "sum",
    **pairs: str | None,
) -> Tensor:
    weight = dict.fromkeys(("orthogonal", "contrast", "uniformity"), 1.0) | dict(weights or {})

    def one(a: str, b: str, kept: list[int]) -> Tensor:
        value, potentials = zero(case), zero(case)
        for name in (a, b):
            shared, own, again = (
                group[name][kept] for group in (case.vectors, case.independent, case.independent_augmented)
            )
            value = value + weight["orthogonal"] * (shared * own).sum(1).square().mean()
            value = value + weight["contrast"] * cross_entropy(own @ again.T / temperature, case.ids[kept])
            kernel, counted = kernel_matrix(own, case.ids[kept], uniformity_t)
            potentials = potentials + kernel[counted].sum()
        return value + weight["uniformity"] * (potentials / len(kept)).log()

    return over_pairs(case, one, reduce=reduce, **pairs)


def brownian_bridge(
    case: Case, *, position: float = 0.25, reduce: str = "sum", anchor: str | None = "text", pairs: str = "all"
) -> Tensor:
    def one(a: str, b: str, kept: list[int]) -> Tensor:
        first, second = (b, a) if anchor is not None else (a, b)
        middle = position * case.vectors[first][kept] + (1 - position) * case.vectors[second][kept]
        middle = middle / middle.norm(dim=1, keepdim=True)
        return (case.augmented[first][kept] - middle).square().sum(1).mean()

    return over_pairs(case, one, pairs, anchor, reduce)


def geometric_consistency(
    case: Case, *, augmented: bool = True, normalizer: str = "samples", reduce: str = "sum", **pairs: str | None
) -> Tensor:
    def one(a: str, b: str, kept: list[int]) -> Tensor:
        v, t, va, ta = (group[name][kept] for group in (case.vectors, case.augmented) for name in (a, b))
        ids = case.ids[kept]
        counted = (ids[:, None] != ids[None]) | torch.eye(len(ids), dtype=torch.bool)
        divisor = counted.sum() if normalizer == "pairs" else len(kept)
        sums = (v @ t.T - t @ v.T).square() + (v @ v.T - t @ t.T).square()
        value = sums[counted].sum() / divisor
        if augmented:
            sums = (v @ v.T - va @ va.T).square() + (t @ t.T - ta @ ta.T).square()
            value = value + sums[counted].sum() / divisor + ((v * t).sum(1) - (va * ta).sum(1)).square().mean()
        return value

    return over_pairs(case, one, reduce=reduce, **pairs)


REFERENCES: dict[str, Reference] = {
    "gram": gram,
    "triangle": triangle,
    "infonce": infonce,
    "sigmoid": sigmoid,
    "symile": symile,
    "pmrl": pmrl,
    "centrobind": centrobind,
    "unialign": unialign,
    "feature_separation": feature_separation,
    "brownian_bridge": brownian_bridge,
    "geometric_consistency": geometric_consistency,
}
