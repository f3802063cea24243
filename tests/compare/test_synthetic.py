"""Cells of the synthetic comparison: equal terms for all objectives, and objectives that do what they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.settings import UserError
from pretrain.compare.cells import Cell, list_cells
from pretrain.compare.config import SyntheticConfig
from pretrain.compare.generator import draw_data
from pretrain.compare.measures import retrieval_measures, sign_measures
from pretrain.compare.synthetic import Diverged, batches, build, check_cell, measure, run_cell, train
from pretrain.objective_config import OPTIONS
from tests.compare.small import small_config, small_values

OWN = {"anchor": "best"}
ONE_OF_EACH: list[dict[str, Any]] = [
    {"label": name, "objective": [{"name": name, **(OWN if "anchor" in kind.model_fields else {})}]}
    for name, kind in sorted(OPTIONS.items())
]
BASELINE = {"label": "infonce", "objective": [{"name": "infonce"}]}


def cells_and_experiment(
    out_dir: Path, entries: list[dict[str, Any]], **experiment: Any
) -> tuple[list[Cell], SyntheticConfig]:
    values = small_values(out_dir)["experiment"]
    baseline = entries[0]["label"]
    config = small_config(
        out_dir, objectives=entries, seeds=[0], baseline=baseline, experiment={**values, **experiment}
    )
    assert isinstance(config.experiment, SyntheticConfig)
    return list_cells(config), config.experiment


@pytest.mark.parametrize("entry", ONE_OF_EACH, ids=lambda entry: entry["label"])
def test_every_objective_of_the_registry_trains_and_is_measured(tmp_path: Path, entry: dict[str, Any]) -> None:
    cells, experiment = cells_and_experiment(tmp_path, [entry])
    check_cell(cells[0], experiment)
    outcome = run_cell(cells[0], experiment)
    assert outcome.note == ""
    expected = {"loss", "accuracy/x1", "accuracy/one", "accuracy/all", "positive_cosine/x1-x2", "anti_aligned"}
    expected |= {"recall_at_1/x1 -> x3/cosine", "recall_at_1/x3 -> others/volume", "recall_at_1/one -> one/cosine"}
    assert expected <= set(outcome.metrics)
    assert all(torch.tensor(value).isfinite() for value in outcome.metrics.values())
    assert run_cell(cells[0], experiment) == outcome  # bitwise: nothing but the cell decides


def test_data_weights_and_batches_are_those_of_all_objectives(tmp_path: Path) -> None:
    entries = [BASELINE, ONE_OF_EACH[[e["label"] for e in ONE_OF_EACH].index("feature_separation")]]
    cells, experiment = cells_and_experiment(tmp_path, entries)
    plain, separated = (build(cell, experiment)[0] for cell in cells)
    drawn = [draw_data(experiment.generator, cell.modalities, cell.seed) for cell in cells]
    for part in ("train", "test"):
        assert all(
            torch.equal(rows, getattr(drawn[1], part).observed[name])
            for name, rows in getattr(drawn[0], part).observed.items()
        )
    for one, other in zip(*(batches(data.train, experiment.budget, 0) for data in drawn), strict=True):
        assert all(torch.equal(rows, other.observed[name]) for name, rows in one.observed.items())
    own = plain.state_dict()
    other = separated.state_dict()
    assert len(other) > len(own)  # the second projections
    assert all(torch.equal(value, other[name]) for name, value in own.items())


def test_every_sample_once_an_epoch_in_an_order_of_the_seed(tmp_path: Path) -> None:
    cells, experiment = cells_and_experiment(tmp_path, [BASELINE])
    samples = draw_data(experiment.generator, cells[0].modalities, 0).train
    budget = experiment.budget.model_copy(update={"num_steps": 8})

    def drawn(seed: int) -> torch.Tensor:
        return torch.cat([batch.observed["x1"][:, 0] for batch in batches(samples, budget, seed)])

    first = drawn(0)
    everything = samples.observed["x1"][:, 0].sort().values
    for epoch in (first[:64], first[64:]):
        assert torch.equal(epoch.sort().values, everything)
    assert not torch.equal(first[:64], first[64:])
    assert torch.equal(first, drawn(0))
    assert not torch.equal(first, drawn(1))


def test_a_frozen_anchor_stays_and_the_others_move(tmp_path: Path) -> None:
    entries = [{"label": "bind", "freeze_anchor": True, "objective": [{"name": "infonce", "anchor": "worst"}]}]
    cells, experiment = cells_and_experiment(tmp_path, entries)
    encoders, objective = build(cells[0], experiment)
    before = {name: value.clone() for name, value in encoders.state_dict().items()}
    train(
        cells[0], experiment.budget, encoders, objective, draw_data(experiment.generator, ("x1", "x2", "x3"), 0).train
    )
    moved = {
        name.split(".")[1] for name, value in encoders.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved == {"x2", "x3"}


def test_training_finds_what_random_encoders_do_not(tmp_path: Path) -> None:
    """The latent is in every modality, so InfoNCE must find pairs; untrained encoders find one in 100 by chance."""
    experiment: dict[str, Any] = {
        "generator": {
            "name": "mixture", "num_modalities": [3], "num_components": 4, "latent_dim": 4, "observed_dim": 16,
            "noise_worst": 0.1, "noise_best": 0.1, "num_train": 512, "num_test": 100,
        },
        "encoder": {"hidden_dim": 32, "embedding_dim": 16},
        "budget": {"num_steps": 120, "batch": 128},
        "readout": None,
    }  # fmt: skip
    cells, settings = cells_and_experiment(tmp_path, [BASELINE, {"label": "untrained", "objective": []}], **experiment)
    trained, untrained = (run_cell(cell, settings).metrics["recall_at_1/one -> one/cosine"] for cell in cells)
    assert untrained < 0.08
    assert trained > 0.4


def test_a_loss_that_is_not_finite_is_a_note(tmp_path: Path) -> None:
    entries = [{"label": "wild", "objective": [{"name": "unialign", "anchor": "best", "weight": 1e39}]}]
    cells, experiment = cells_and_experiment(tmp_path, entries)
    outcome = run_cell(cells[0], experiment)
    assert outcome.metrics == {}
    assert outcome.note.startswith("loss ")
    assert outcome.note.endswith(" at step 1 of 4")


def test_weights_that_are_not_finite_are_not_measured(tmp_path: Path) -> None:
    cells, experiment = cells_and_experiment(tmp_path, [BASELINE])
    samples = draw_data(experiment.generator, cells[0].modalities, 0).train
    one_step = experiment.budget.model_copy(update={"num_steps": 1})
    encoders, objective = build(cells[0], experiment)
    next(encoders.parameters()).register_hook(lambda grad: grad * torch.nan)  # after the last loss
    with pytest.raises(Diverged, match="weights are not finite after 1 steps"):
        train(cells[0], one_step, encoders, objective, samples)
    encoders, objective = build(cells[0], experiment)
    with torch.no_grad():
        next(encoders.parameters()).fill_(torch.nan)
    with pytest.raises(Diverged, match="loss nan at step 1 of 4"):
        train(cells[0], experiment.budget, encoders, objective, samples)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"name": "gram"}, "anchor 'text'; (valid: x1, x2, x3)"),
        ({"name": "gram", "anchor": "x33"}, "did you mean 'x3'?"),
        ({"name": "infonce", "pairs": [["x1", "x4"]]}, "modality 'x4'"),
    ],
)
def test_a_mistake_is_said_before_anything_is_trained(tmp_path: Path, objective: dict[str, Any], said: str) -> None:
    cells, experiment = cells_and_experiment(tmp_path, [{"label": "a", "objective": [objective]}])
    with pytest.raises(UserError) as caught:
        check_cell(cells[0], experiment)
    assert said in str(caught.value)


def test_too_many_modalities_for_an_area(tmp_path: Path) -> None:
    values = small_values(tmp_path)["experiment"]
    generator = {**values["generator"], "num_modalities": [4]}
    entries = [{"label": "triangle", "objective": [{"name": "triangle", "anchor": "best"}]}]
    cells, experiment = cells_and_experiment(tmp_path, entries, generator=generator)
    with pytest.raises(UserError, match="an area has three corners"):
        check_cell(cells[0], experiment)


def test_too_many_tuples_in_a_batch_are_said_before_anything_is_trained(tmp_path: Path) -> None:
    symile = {"name": "symile", "candidates": "all", "max_tuples": 50}
    cells, experiment = cells_and_experiment(tmp_path, [{"label": "a", "objective": [symile]}])
    with pytest.raises(UserError, match="max_tuples = 50"):
        check_cell(cells[0], experiment)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("encoder", {"hidden_dim": 8, "embedding_dim": 2}, "expected at least 3, the modalities"),
        ("generator", {"name": "mixture", "noise_worst": 0.1, "noise_best": 0.3}, "expected at least noise_best"),
    ],
)
def test_sizes_that_cannot_be(tmp_path: Path, key: str, value: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        cells_and_experiment(tmp_path, [BASELINE], **{key: value})


def test_an_anchor_is_frozen_where_there_is_one(tmp_path: Path) -> None:
    plain = {"label": "a", "freeze_anchor": True, "objective": [{"name": "infonce"}]}
    with pytest.raises(UserError, match="no objective names its anchor"):
        cells_and_experiment(tmp_path, [plain])


def test_labels_of_each_anchor_are_there_once(tmp_path: Path) -> None:
    entries = [
        {"label": "bind x1", "objective": [{"name": "infonce", "anchor": "x1"}]},
        {"label": "bind", "each_anchor": True, "objective": [{"name": "infonce"}]},
    ]
    with pytest.raises(UserError, match="'bind x1' is there twice"):
        cells_and_experiment(tmp_path, entries)


def test_retrieval_of_known_embeddings() -> None:
    """x1 = x2, and x3 opposite to them: found by volume, not by cosine; and the sign is seen."""
    rows = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    vectors = {"x1": rows, "x2": rows.clone(), "x3": -rows}
    found = retrieval_measures(vectors, "centroid")
    assert found["recall_at_1/x3 -> others/own"] == found["recall_at_1/x3 -> others/centroid"] == 0.0
    assert found["recall_at_1/x1 -> x2/cosine"] == 1.0
    assert found["recall_at_1/x1 -> x3/cosine"] == found["recall_at_1/x3 -> others/summed_cosine"] == 0.0
    assert found["recall_at_1/one -> one/cosine"] == pytest.approx(2 / 6)
    signs = sign_measures(vectors)
    assert signs["anti_aligned"] == 2.0
    assert signs["positive_cosine/x1-x3"] == pytest.approx(-1.0)


def test_measuring_leaves_the_encoders_as_they_were(tmp_path: Path) -> None:
    cells, experiment = cells_and_experiment(tmp_path, [BASELINE])
    data = draw_data(experiment.generator, cells[0].modalities, 0)
    encoders, _ = build(cells[0], experiment)
    before = {name: value.clone() for name, value in encoders.state_dict().items()}
    first = measure(encoders, data, experiment, "volume")
    assert measure(encoders, data, experiment, "volume") == first
    assert all(torch.equal(value, before[name]) for name, value in encoders.state_dict().items())
    assert encoders.training
    assert all(parameter.grad is None for parameter in encoders.parameters())
