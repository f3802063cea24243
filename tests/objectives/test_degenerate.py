"""No input makes a value or a gradient NaN or infinite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.objectives import build_objective
from tests.objectives.cases import MOST, degenerate_vectors, gradients, random_case
from tests.objectives.references import REFERENCES

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "gram": [{"orientation": 1.0}],
    "pmrl": [{"orientation": 1.0}, {"sign": "free"}],
    "symile": [{"candidates": "all"}, {}],
    "centrobind": [{"normalize": True}, {}],
    "unialign": [{}, {"uniformity": "entropy"}],
    "brownian_bridge": [{"position": 0.5}],
    "infonce": [{"within": 1.0, "pairs": [["text", "video+audio"], ["video", "audio"]]}],
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("modalities", [3, 4])
@pytest.mark.parametrize("which", degenerate_vectors(3, torch.float32))
def test_degenerate_samples_have_finite_values_and_gradients(
    name: str, dtype: torch.dtype, modalities: int, which: str
) -> None:
    modalities = min(modalities, MOST.get(name, modalities))
    vectors = degenerate_vectors(modalities, dtype)[which]
    count, dim = vectors["text"].shape
    for options in OPTIONS.get(name, [{}]):
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
            found = [*gradients(loss, case), *_of_scalars(objective, case)]
            assert all(torch.isfinite(gradient).all() for gradient in found), (options, views)


def _of_scalars(objective: Any, case: Any) -> list[torch.Tensor]:
    parameters = list(objective.parameters())
    loss = objective(case.embeddings()).loss
    return list(torch.autograd.grad(loss, parameters, materialize_grads=True)) if parameters else []


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("left", ["text", "video", None])
def test_all_but_one_modality_missing_is_a_loss_of_zero(name: str, left: str | None) -> None:
    case = random_case(4)
    for modality, mask in case.present.items():
        mask[:] = modality == left
    loss = build_objective(name)(case.embeddings()).loss
    assert loss.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(loss, case))


@pytest.mark.parametrize("name", REFERENCES)
def test_one_sample_among_many_that_lack_everything(name: str) -> None:
    case = random_case(5)
    for mask in case.present.values():
        mask[1:] = False
    loss = build_objective(name)(case.embeddings()).loss
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, case))
