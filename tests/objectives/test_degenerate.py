"""No input makes a value or a gradient NaN or infinite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.objectives import build_objective
from tests.objectives.cases import MOST, OPTIONS, degenerate_vectors, gradients, random_case, scalar_gradients
from tests.objectives.references import REFERENCES

SIZES = [
    pytest.param(name, k, marks=[pytest.mark.slow] if k >= 4 else [])
    for name in REFERENCES
    for k in range(2, 1 + MOST.get(name, 5))
]
KINDS = [(name, options) for name in REFERENCES for options in OPTIONS.get(name, [{}])]


@pytest.mark.parametrize(("name", "modalities"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", degenerate_vectors(3, torch.float32))
def test_degenerate_samples_have_finite_values_and_gradients(
    name: str, dtype: torch.dtype, modalities: int, which: str
) -> None:
    vectors = degenerate_vectors(modalities, dtype)[which]
    count, dim = vectors["text"].shape
    for options in OPTIONS.get(name, [{}]):
        if modalities == 2 and "pairs" in options:
            continue  # it names three
        objective = build_objective(name, **options).to(dtype)
        for views in ("other", "same"):
            case = random_case(count, dim, modalities, dtype=dtype, vectors={n: v.clone() for n, v in vectors.items()})
            if views == "same":
                for group in (case.augmented, case.independent, case.independent_augmented):
                    for modality, tensor in group.items():
                        with torch.no_grad():
                            tensor.copy_(vectors[modality])
            loss = objective(case.embeddings()).loss
            assert torch.isfinite(loss), options
            found = [*gradients(loss, case, retain_graph=True), *scalar_gradients(loss, objective)]
            assert all(torch.isfinite(gradient).all() for gradient in found), (options, views)


@pytest.mark.parametrize(("name", "options"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left", ["text", "video", None])
def test_all_but_one_modality_missing_is_a_loss_of_zero(
    name: str, options: dict[str, Any], dtype: torch.dtype, left: str | None
) -> None:
    case = random_case(4, dtype=dtype)
    for modality, mask in case.present.items():
        mask[:] = modality == left
    objective = build_objective(name, **options).to(dtype)
    loss = objective(case.embeddings()).loss
    assert loss.item() == 0
    found = [*gradients(loss, case, retain_graph=True), *scalar_gradients(loss, objective)]
    assert all(gradient.abs().max() == 0 for gradient in found)


@pytest.mark.parametrize(("name", "options"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_sample_among_many_that_lack_everything(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    case = random_case(5, dtype=dtype)
    for mask in case.present.values():
        mask[1:] = False
    objective = build_objective(name, **options).to(dtype)
    loss = objective(case.embeddings()).loss
    found = [*gradients(loss, case, retain_graph=True), *scalar_gradients(loss, objective)]
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in found)


@pytest.mark.parametrize(("name", "options"), KINDS)
@pytest.mark.parametrize("modality", ["text", "video", "audio"])
def test_a_row_that_is_no_number_is_a_loss_that_is_none(name: str, options: dict[str, Any], modality: str) -> None:
    """Never an error: the trainer agrees over ranks to skip such a step, and one that raises would leave the others
    waiting."""
    case = random_case(6)
    with torch.no_grad():
        for group in (case.vectors, case.augmented, case.independent, case.independent_augmented):
            group[modality][2] = torch.nan
    objective = build_objective(name, **options).double()
    loss = objective(case.embeddings()).loss
    assert torch.isnan(loss)
    gradients(loss, case)
