"""A cell of the synthetic comparison: draw data and encoders, train them under the objective, measure.

Data, first weights and the order of batches depend on the seed and the setting, never on the objective: two objectives
are compared on equal terms, seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pretrain.compare.cells import Cell, Outcome
from pretrain.compare.config import BudgetConfig, SyntheticConfig
from pretrain.compare.encoders import Encoders
from pretrain.compare.generator import Samples, SyntheticData, draw_data
from pretrain.compare.measures import readout_measures, retrieval_measures, sign_measures
from pretrain.config import OptimizerConfig, ScheduleConfig
from pretrain.objectives import WeightedSum
from pretrain.pairwise import evaluate_terms
from pretrain.randomness import keyed_random
from pretrain.schedule import learning_rate
from pretrain.scoring.names import own_score


class Diverged(Exception):
    """The loss or a weight is not finite."""


def check_cell(cell: Cell, experiment: SyntheticConfig) -> None:
    """Refuse an objective that the setting cannot have, before anything is trained.

    Raises:
        UserError: an unknown anchor, too many modalities, too few dimensions for them, too many tuples in a batch.
    """
    encoders, objective = build(cell, experiment)
    samples = draw_data(experiment.generator, cell.modalities, cell.seed).train.rows(0, experiment.budget.batch)
    if cell.entry.objective:
        _loss(encoders, objective, samples, wanted_views(cell))


def run_cell(cell: Cell, experiment: SyntheticConfig) -> Outcome:
    """Train and measure; the result of a cell whose loss stops being finite is a note that says so."""
    data = draw_data(experiment.generator, cell.modalities, cell.seed)
    encoders, objective = build(cell, experiment)
    try:
        metrics = train(cell, experiment.budget, encoders, objective, data.train)
    except Diverged as error:
        return Outcome(metrics={}, note=str(error))
    own = own_score(part.name for part in cell.entry.objective)
    return Outcome(metrics=metrics | measure(encoders, data, experiment, own))


def build(cell: Cell, experiment: SyntheticConfig) -> tuple[Encoders, WeightedSum]:
    """Encoders as the seed draws them, and the objective; the anchor's encoder frozen if the entry says so."""
    objective = WeightedSum(cell.entry.objective, cell.modalities)
    with keyed_random("comparison encoders", cell.seed, len(cell.modalities)):
        encoders = Encoders(
            cell.modalities,
            experiment.generator.observed_dim,
            experiment.encoder,
            independent="independent" in wanted_views(cell),
        )
    if cell.entry.freeze_anchor and cell.anchor is not None:
        encoders.freeze(cell.anchor)
    return encoders, objective


def wanted_views(cell: Cell) -> frozenset[str]:
    """The views that the objectives of a cell want."""
    return frozenset().union(*(part.views for part in cell.entry.objective))


def train(
    cell: Cell, budget: BudgetConfig, encoders: Encoders, objective: WeightedSum, samples: Samples
) -> dict[str, float]:
    """Train in place; the loss of the last step.

    Raises:
        Diverged: the loss or a weight is not finite.
    """
    if not cell.entry.objective:
        return {}
    optimizer_config = OptimizerConfig(lr=cell.entry.lr or budget.lr)
    schedule = ScheduleConfig(num_steps=budget.num_steps, warmup_steps=budget.warmup_steps)
    parameters = [p for p in [*encoders.parameters(), *objective.parameters()] if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=optimizer_config.lr)
    views, last = wanted_views(cell), math.nan
    for step, batch in enumerate(batches(samples, budget, cell.seed)):
        optimizer.param_groups[0]["lr"] = learning_rate(step, optimizer_config, schedule)
        loss = _loss(encoders, objective, batch, views)
        last = loss.item()
        if not math.isfinite(last):
            raise Diverged(f"loss {last} at step {step + 1} of {budget.num_steps}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not all(parameter.isfinite().all() for parameter in parameters):  # whose rows count as missing: the loss is 0
        raise Diverged(f"weights are not finite after {budget.num_steps} steps")
    return {"loss": last}


def batches(samples: Samples, budget: BudgetConfig, seed: int) -> Iterator[Samples]:
    """`num_steps` batches: every sample once an epoch, as far as whole batches go, in an order of (seed, epoch)."""
    num_samples = len(samples.labels)
    a_epoch = num_samples // budget.batch
    for step in range(budget.num_steps):
        if step % a_epoch == 0:
            with keyed_random("comparison order", seed, step // a_epoch):
                order = torch.randperm(num_samples)
        rows = order[step % a_epoch * budget.batch :][: budget.batch]
        yield Samples(
            observed={name: vectors[rows] for name, vectors in samples.observed.items()},
            again={name: vectors[rows] for name, vectors in samples.again.items()},
            labels=samples.labels[rows],
        )


def _loss(encoders: Encoders, objective: WeightedSum, samples: Samples, views: frozenset[str]) -> Tensor:
    embeddings = encoders(samples, augmented="augmented" in views)
    return evaluate_terms(objective.loss_terms(embeddings, objective.scalars())).local_loss.squeeze()


@torch.no_grad()
def measure(encoders: Encoders, data: SyntheticData, experiment: SyntheticConfig, own: str) -> dict[str, float]:
    """Retrieval and signs on the test samples; read-outs trained on the embeddings of the training samples. own: the
    objective's own score of tuples."""
    test = encoders.embed(data.test)
    found = retrieval_measures(test, own) | sign_measures(test)
    if experiment.readout is None:
        return found
    return found | readout_measures(experiment.readout, encoders.embed(data.train), test, data)
