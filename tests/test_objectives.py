"""Objectives against float64 references written from their formulas; masks, duplicates, degenerate tuples, ranks."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.settings import UserError
from pretrain.collectives import World
from pretrain.objectives import Embeddings, build_objective
from pretrain.pairwise import evaluate_terms
from tests.ranks import run_ranks

NAMES = ("text", "video", "audio", "depth", "thermal")


def unit_rows(
    count: int, dim: int, modalities: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.functional.normalize(
            torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1
        ).to(dtype)
        for name in NAMES[:modalities]
    }


def volume(vectors: list[Tensor]) -> Tensor:
    """sqrt(det(M M^T)) with the vectors as rows of M."""
    matrix = torch.stack(vectors)
    return (matrix @ matrix.T).det().clamp_min(0).sqrt()


def masked_cross_entropy(logits: Tensor, allowed: Tensor, smoothing: float) -> Tensor:
    """Mean over rows of lse_j L_ij - (1 - s) L_ii - s mean_j L_ij, over the allowed j."""
    losses = []
    for i, row in enumerate(logits):
        kept = row[allowed[i]]
        losses.append(kept.logsumexp(0) - (1 - smoothing) * row[i] - smoothing * kept.mean())
    return torch.stack(losses).mean()


def reference_gram(
    vectors: dict[str, Tensor], present: dict[str, Tensor], ids: Tensor, temperature: float, smoothing: float
) -> Tensor:
    others = [name for name in vectors if name != "text"]
    kept = [i for i in range(len(ids)) if present["text"][i] and any(present[name][i] for name in others)]
    logits = torch.stack(
        [
            torch.stack(
                [
                    -volume([vectors["text"][i]] + [vectors[m][j] for m in others if present[m][j]]) / temperature
                    for j in kept
                ]
            )
            for i in kept
        ]
    )
    allowed = (ids[kept, None] != ids[None, kept]) | torch.eye(len(kept), dtype=torch.bool)
    return (masked_cross_entropy(logits, allowed, smoothing) + masked_cross_entropy(logits.T, allowed.T, smoothing)) / 2


def reference_infonce(
    vectors: dict[str, Tensor], present: dict[str, Tensor], ids: Tensor, temperature: float, smoothing: float
) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.combinations(vectors, 2):
        kept = [i for i in range(len(ids)) if present[a][i] and present[b][i]]
        if not kept:
            continue
        logits = vectors[a][kept] @ vectors[b][kept].T / temperature
        allowed = (ids[kept, None] != ids[None, kept]) | torch.eye(len(kept), dtype=torch.bool)
        total = (
            total
            + (masked_cross_entropy(logits, allowed, smoothing) + masked_cross_entropy(logits.T, allowed.T, smoothing))
            / 2
        )
    return total


REFERENCES = {"gram": reference_gram, "infonce": reference_infonce}


def some_masks(count: int, modalities: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(count, generator=generator) > 0.3 for name in NAMES[:modalities]}


@pytest.mark.parametrize("name", ["gram", "infonce"])
@pytest.mark.parametrize("modalities", [2, 3, 4, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradient_equal_the_formula(name: str, modalities: int, count: int, masked: bool) -> None:
    dim = 8
    vectors = {key: value.requires_grad_() for key, value in unit_rows(count, dim, modalities).items()}
    present = (
        some_masks(count, modalities, 3) if masked else {key: torch.ones(count, dtype=torch.bool) for key in vectors}
    )
    present = {key: mask | (torch.arange(count) == 0) for key, mask in present.items()}  # something is always left
    ids = torch.arange(count) // 2 if masked else torch.arange(count)
    for tile in (3, 1024):
        objective = build_objective(name, temperature=0.2, learn_temperature=False, label_smoothing=0.1, tile=tile)
        loss = objective(Embeddings(vectors=vectors, present=present, ids=ids)).loss
        expected = REFERENCES[name](vectors, present, ids, 0.2, 0.1)
        assert loss.dtype == torch.float64
        assert abs(loss - expected).item() <= 1e-10
        found = torch.autograd.grad(loss, list(vectors.values()), materialize_grads=True)
        wanted = torch.autograd.grad(expected, list(vectors.values()), materialize_grads=True)
        for one, other in zip(found, wanted, strict=True):
            assert (one - other).abs().max().item() <= 1e-8


@pytest.mark.parametrize("name", ["gram", "infonce"])
def test_gradient_equals_finite_differences(name: str) -> None:
    vectors = unit_rows(5, 8, 3)
    objective = build_objective(name).double()

    def loss(*values: Tensor) -> Tensor:
        out = objective(Embeddings(vectors=dict(zip(vectors, values, strict=True)))).loss
        assert isinstance(out, Tensor)
        return out

    assert torch.autograd.gradcheck(loss, [v.requires_grad_() for v in vectors.values()], atol=1e-6)


@pytest.mark.parametrize("name", ["gram", "infonce"])
def test_temperature_gradient_equals_finite_differences(name: str) -> None:
    objective = build_objective(name, temperature=0.3).double()
    embeddings = Embeddings(vectors=unit_rows(6, 8, 3))
    parameter = objective.scalars.values["temperature"]
    objective(embeddings).loss.backward()
    step = 1e-6
    with torch.no_grad():
        parameter += step
        above = objective(embeddings).loss
        parameter -= 2 * step
        below = objective(embeddings).loss
    assert parameter.grad is not None
    assert math.isclose(parameter.grad.item(), ((above - below) / (2 * step)).item(), rel_tol=1e-6)


def degenerate_cases(dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    base = unit_rows(4, 3, 3, dtype=dtype)
    text = base["text"]
    zero_row = base["video"].clone()
    zero_row[1] = 0
    axes = torch.eye(3, dtype=dtype)
    return {
        "identical": {name: text.clone() for name in base},
        "opposite": {"text": text, "video": -text, "audio": text.clone()},
        "two identical": {"text": text, "video": base["video"], "audio": base["video"].clone()},
        "nearly identical": {"text": text, "video": text + 1e-7, "audio": base["audio"]},
        "orthogonal": {"text": axes[[0] * 4], "video": axes[[1] * 4], "audio": axes[[2] * 4]},
        "zero row": {"text": text, "video": zero_row, "audio": base["audio"]},
        "all samples equal": {name: value[[0] * 4] for name, value in base.items()},
    }


@pytest.mark.parametrize("name", ["gram", "infonce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", list(degenerate_cases(torch.float32)))
def test_degenerate_tuples_give_finite_values_and_gradients(name: str, dtype: torch.dtype, case: str) -> None:
    vectors = {key: value.clone().requires_grad_() for key, value in degenerate_cases(dtype)[case].items()}
    objective = build_objective(name, **({"orientation": 1.0} if name == "gram" else {}))
    loss = objective(Embeddings(vectors=vectors)).loss
    gradients = torch.autograd.grad(loss, list(vectors.values()), materialize_grads=True)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", ["gram", "infonce"])
def test_values_behind_a_mask_change_nothing(name: str) -> None:
    present = some_masks(9, 3, 1)
    clean = unit_rows(9, 8, 3)
    spoiled = {key: torch.where(present[key][:, None], value, torch.nan) for key, value in clean.items()}
    losses, gradients = [], []
    for vectors in (clean, spoiled):
        leaves = [value.clone().requires_grad_() for value in vectors.values()]
        loss = build_objective(name)(Embeddings(vectors=dict(zip(vectors, leaves, strict=True)), present=present)).loss
        losses.append(loss.item())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)]))
    assert losses[0] == losses[1]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", ["gram", "infonce"])
def test_modality_missing_everywhere_is_the_objective_of_the_others(name: str) -> None:
    vectors = {key: value.requires_grad_() for key, value in unit_rows(6, 8, 4).items()}
    everyone = torch.ones(6, dtype=torch.bool)
    present = {key: everyone & (key != "audio") for key in vectors}
    objective = build_objective(name, learn_temperature=False)
    loss = objective(Embeddings(vectors=vectors, present=present)).loss
    without = objective(Embeddings(vectors={key: value for key, value in vectors.items() if key != "audio"})).loss
    assert abs(loss - without).item() <= 1e-12
    assert torch.autograd.grad(loss, vectors["audio"], materialize_grads=True)[0].abs().max().item() == 0


def test_samples_without_anchor_or_partner_are_dropped() -> None:
    vectors = unit_rows(6, 8, 3)
    present = {name: torch.ones(6, dtype=torch.bool) for name in vectors}
    present["text"][4] = False
    present["video"][5] = present["audio"][5] = False
    objective = build_objective("gram", learn_temperature=False)
    loss = objective(Embeddings(vectors=vectors, present=present)).loss
    kept = objective(Embeddings(vectors={name: value[:4] for name, value in vectors.items()})).loss
    assert abs(loss - kept).item() <= 1e-12


def test_volume_does_not_depend_on_the_order_of_the_others() -> None:
    vectors = unit_rows(7, 8, 4)
    objective = build_objective("gram")
    losses = [
        objective(Embeddings(vectors={"text": vectors["text"], **{name: vectors[name] for name in order}})).loss.item()
        for order in itertools.permutations(["video", "audio", "depth"])
    ]
    assert max(losses) - min(losses) <= 1e-12


def test_orientation_pushes_negative_anchor_cosines_up() -> None:
    text = unit_rows(4, 8, 1)["text"]
    video = (-text).requires_grad_()
    embeddings = Embeddings(vectors={"text": text, "video": video})
    plain = build_objective("gram", learn_temperature=False)(embeddings).loss
    turned = build_objective("gram", learn_temperature=False, orientation=2.0)(embeddings).loss
    assert abs(turned - plain - 2.0).item() <= 1e-12  # the hinge on a cosine of -1
    direction = torch.autograd.grad(turned - plain, video)[0]
    assert torch.allclose(direction, -2.0 * text / 4)


def test_sum_of_modalities_as_a_side_of_a_pair() -> None:
    vectors = unit_rows(6, 8, 3)
    loss = build_objective("infonce", pairs=[("text", "video+audio")], learn_temperature=False)(
        Embeddings(vectors=vectors)
    ).loss
    joint = torch.nn.functional.normalize(vectors["video"] + vectors["audio"], dim=1)
    logits = vectors["text"] @ joint.T / 0.07
    target = torch.arange(6)
    expected = (
        torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
    ) / 2
    assert abs(loss - expected).item() <= 1e-12


@pytest.mark.parametrize(
    ("name", "options", "nearest"),
    [
        ("gramm", {}, "did you mean 'gram'?"),
        ("gram", {"temprature": 0.1}, "did you mean 'temperature'?"),
        ("gram", {"temperature": 2.0}, "temperature 2.0 is not inside"),
        ("infonce", {"anchor": "txt", "modalities": ("text", "video")}, "did you mean 'text'?"),
    ],
)
def test_mistakes_are_one_line(name: str, options: dict[str, Any], nearest: str) -> None:
    with pytest.raises(UserError) as caught:
        build_objective(name, **options)
    assert nearest in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_modalities_than_dimensions_are_refused() -> None:
    with pytest.raises(UserError, match="3 modalities in 2 dimensions"):
        build_objective("gram")(Embeddings(vectors=unit_rows(4, 2, 3)))


def distributed_losses(world: World, argument: Any) -> dict[str, list[float]]:
    """Loss, flattened gradient of local rows and of the temperature, for each objective and dtype, on this rank."""
    found = {}
    for name, dtype in itertools.product(("gram", "infonce"), ("float32", "float64")):
        vectors, present, ids = distributed_case(getattr(torch, dtype))
        part = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
        leaves = {key: value[part].clone().requires_grad_() for key, value in vectors.items()}
        objective = build_objective(name, **({"orientation": 0.5} if name == "gram" else {}))
        local = Embeddings(vectors=leaves, present={key: mask[part] for key, mask in present.items()}, ids=ids[part])
        value = evaluate_terms(objective.terms(local, objective.scalars()), world)
        value.local_loss.backward()
        scalar = objective.scalars.values["temperature"].grad
        assert scalar is not None
        total = world.sum(scalar)
        rows = torch.stack([leaf.grad for leaf in leaves.values() if leaf.grad is not None])
        found[f"{name}/{dtype}"] = [value.metrics["loss"].item(), total.item(), *rows.flatten().tolist()]
    return found


def distributed_case(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Eight samples; audio is missing from the whole second half, other masks are ragged, two ids are equal."""
    vectors = unit_rows(8, 6, 3, dtype=dtype)
    present = some_masks(8, 3, 5)
    present["text"][0] = present["video"][0] = True
    present["audio"][4:] = False
    return vectors, present, torch.tensor([0, 1, 2, 3, 4, 1, 6, 7])


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_with_unequal_masks_equal_one_process(tmp_path: Path, size: int) -> None:
    alone = distributed_losses(World(), None)
    together = run_ranks("tests.test_objectives:distributed_losses", size, tmp_path)
    for case, expected in alone.items():
        tolerance = 1e-6 if case.endswith("float32") else 1e-12
        whole = torch.tensor(expected[2:], dtype=torch.float64).view(3, 8, 6)
        parts = torch.cat(
            [torch.tensor(rank[case][2:], dtype=torch.float64).view(3, -1, 6) for rank in together], dim=1
        )
        assert ((parts - whole).norm() / whole.norm()).item() <= tolerance, case
        for rank in together:
            assert math.isclose(rank[case][0], expected[0], rel_tol=tolerance), case
            # The temperature is an fp32 parameter, so its gradient is rounded to fp32 on every rank.
            assert math.isclose(rank[case][1], expected[1], rel_tol=1e-6), case
