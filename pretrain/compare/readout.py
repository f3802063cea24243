"""What a classifier reads out of frozen embeddings."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pretrain.randomness import keyed_random

MAX_ITERATIONS = 60
PENALTY = 1e-3  # on the squares of the weights, half of which is added to the mean loss
HIDDEN_DIM = 64

Train = tuple[Float[Tensor, "train dim"], Int[Tensor, " train"]]  # rows and their labels
Test = tuple[Float[Tensor, "test dim"], Int[Tensor, " test"]]


def accuracy(kind: str, train: Train, test: Test, num_labels: int) -> float:
    """Share of test rows whose label a classifier of the training rows says. kind: linear (multinomial logistic
    regression) or mlp (one hidden layer); whole batch, L-BFGS, on columns of unit variance: the same on every call.
    """
    mean, spread = train[0].mean(dim=0), train[0].std(dim=0).clamp_min(1e-6)
    features = (train[0] - mean) / spread
    with keyed_random("read-out"):
        model = _classifier(kind, features.shape[1], num_labels)
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=MAX_ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(model(features), train[1]) + PENALTY / 2 * sum(w.square().sum() for w in weights)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        found = model((test[0] - mean) / spread).argmax(dim=1)
    return float((found == test[1]).double().mean())


def _classifier(kind: str, dim: int, num_labels: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(dim, num_labels)
    return nn.Sequential(nn.Linear(dim, HIDDEN_DIM), nn.GELU(), nn.Linear(HIDDEN_DIM, num_labels))
