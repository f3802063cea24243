"""What is measured of embeddings: retrieval in every direction, the sign of positives, read-outs. Names of metrics:

recall_at_1/x1 -> x2/cosine          one modality asks for another
recall_at_1/x1 -> others/volume      ... for all others together, by volume or by summed cosine; and back
recall_at_1/x1 -> others/own         ... by the objective's own score of tuples, which has its name, too; and back
recall_at_1/one -> one/cosine        mean of all directions of that kind
accuracy/x1, accuracy/all            label read out of one embedding, of all concatenated; accuracy/one: the mean
positive_cosine/x1-x2                mean cosine of matched pairs; anti_aligned: how many pairs are negative
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, permutations

import torch
from jaxtyping import Float
from torch import Tensor

from pretrain.compare.generator import SyntheticData
from pretrain.compare.readout import accuracy
from pretrain.retrieval import JOINT_SCORES, TIE_TOLERANCE, is_anti_aligned, rank_of_truth
from pretrain.scoring import scores

Vectors = dict[str, Float[Tensor, "samples dim"]]


def retrieval_measures(vectors: Vectors, own: str) -> dict[str, float]:
    """R@1 in [0, 1] of each direction, sample i belonging to sample i; ties count as misses. own: the objective's own
    score of tuples (`pretrain.scoring.names`)."""
    found = {
        f"recall_at_1/{a} -> {b}/cosine": _recall_at_1(scores({a: vectors[a]}, {b: vectors[b]}, "cosine"))
        for a, b in permutations(vectors, 2)
    }
    for name in vectors if len(vectors) > 2 else ():
        others = {other: rows for other, rows in vectors.items() if other != name}
        for score in dict.fromkeys([*JOINT_SCORES, own]):
            matrix = scores({name: vectors[name]}, others, score)
            forth, back = _recall_at_1(matrix), _recall_at_1(matrix.T)
            for label in (score, "own") if score == own else (score,):
                found[f"recall_at_1/{name} -> others/{label}"] = forth
                found[f"recall_at_1/others -> {name}/{label}"] = back
    return found | direction_means(found)


def direction_means(metrics: Mapping[str, float]) -> dict[str, float]:
    """Means over all directions of a kind: recall_at_1/one -> one/cosine, recall_at_1/others -> one/volume ..."""
    kinds: dict[str, list[float]] = {}
    for name, value in metrics.items():
        measure, direction, score = name.split("/")
        sides = direction.split(" -> ")
        if not any("+" in side for side in sides):  # neither one nor all others
            kind = " -> ".join("others" if side == "others" else "one" for side in sides)
            kinds.setdefault(f"{measure}/{kind}/{score}", []).append(value)
    return {kind: sum(values) / len(values) for kind, values in kinds.items()}


def _recall_at_1(matrix: Tensor) -> float:
    ranks = rank_of_truth(matrix, torch.arange(len(matrix)), TIE_TOLERANCE)
    return float((ranks == 0).double().mean())


def sign_measures(vectors: Vectors) -> dict[str, float]:
    """Mean cosine of matched pairs of each two modalities, and how many of those are negative beyond chance."""
    cosines = {f"{a}-{b}": (vectors[a].double() * vectors[b].double()).sum(dim=1) for a, b in combinations(vectors, 2)}
    means = {f"positive_cosine/{pair}": float(values.mean()) for pair, values in cosines.items()}
    return {**means, "anti_aligned": float(sum(is_anti_aligned(values) for values in cosines.values()))}


def readout_measures(
    kind: str,
    train: dict[str, Float[Tensor, "train dim"]],
    test: dict[str, Float[Tensor, "test dim"]],
    data: SyntheticData,
) -> dict[str, float]:
    """Accuracy of the label from each modality's embeddings, their mean, and from all of them concatenated."""
    num_labels = int(max(data.train.labels.max(), data.test.labels.max())) + 1

    def read(train_rows: Tensor, test_rows: Tensor) -> float:
        return accuracy(kind, (train_rows, data.train.labels), (test_rows, data.test.labels), num_labels)

    single = {f"accuracy/{name}": read(train[name], test[name]) for name in train}
    together = read(torch.cat(list(train.values()), dim=1), torch.cat(list(test.values()), dim=1))
    return {**single, "accuracy/one": sum(single.values()) / len(single), "accuracy/all": together}
