"""Towers: what masks mean, where gradients arrive, what may be trained, in which precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.settings import UserError
from pretrain.heads.projection import Projection
from pretrain.towers.build import Towers, parameter_groups
from pretrain.towers.masks import at_least_one, masked_mean
from tests.towers import DIM, SIZES, all_present, build_towers, draw_inputs, hide_garbage, run_config

NAMES = ("video", "audio", "text")
PRESENT = {
    "video": torch.tensor([1, 1, 0, 1, 1], dtype=torch.bool),
    "audio": torch.tensor([1, 0, 1, 1, 0], dtype=torch.bool),
    "text": torch.tensor([0, 1, 1, 1, 1], dtype=torch.bool),
}


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def backward(towers: Towers, embeddings: dict[str, Tensor]) -> None:
    """A loss without symmetry, so that no gradient is zero by chance."""
    weights = torch.linspace(-1.0, 2.0, DIM)
    torch.stack([(rows * weights).square().sum() for rows in embeddings.values()]).sum().backward()


@pytest.mark.parametrize("pooling", ["mean", "transformer"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_behind_a_mask_has_an_effect(pooling: str, training: bool) -> None:
    towers = build_towers(run_config(video={"pooling": pooling})).train(training)
    inputs = draw_inputs(5)
    clean = towers(inputs, PRESENT)
    dirty = towers(hide_garbage(inputs, PRESENT), PRESENT)
    assert all(torch.equal(clean[name], dirty[name]) for name in NAMES)


def test_what_is_not_masked_has_an_effect() -> None:
    towers = build_towers(run_config())
    inputs, other = draw_inputs(5), draw_inputs(5, seed=1)
    shown = {
        "video": {**inputs["video"], "frames": other["video"]["frames"]},
        "audio": {**inputs["audio"], "waveform": other["audio"]["waveform"]},
        "text": {**inputs["text"], "token_ids": other["text"]["token_ids"]},
    }
    before, after = towers(inputs, PRESENT), towers(shown, PRESENT)
    for name in NAMES:
        moved = (before[name] - after[name]).abs().amax(dim=1) > 1e-4
        assert torch.equal(moved, PRESENT[name])


def test_masked_steps_are_as_if_they_were_not_there() -> None:
    inputs, here = draw_inputs(4), torch.ones(4, dtype=torch.bool)
    texts = {**inputs["text"], "token_mask": (torch.arange(10) < 6).expand(4, 10)}
    text = build_towers(run_config()).towers["text"]
    shorter = {name: tensor[:, :6] for name, tensor in texts.items()}
    torch.testing.assert_close(text(texts, here), text(shorter, here), rtol=0, atol=1e-6)
    pictures = {**inputs["video"], "frame_mask": torch.tensor([[True, True, False]]).expand(4, 3)}
    for pooling in ("mean", "transformer"):
        video = build_towers(run_config(video={"pooling": pooling})).towers["video"]
        whole = video(pictures, here)
        if pooling == "transformer":
            video.encoder.over_time.time_embedding = nn.Parameter(video.encoder.over_time.time_embedding[:, :2])
        kept = {name: tensor[:, :2] for name, tensor in pictures.items()}
        torch.testing.assert_close(whole, video(kept, here), rtol=0, atol=1e-6)


def test_the_order_of_frames_matters_to_the_transformer_and_not_to_the_mean() -> None:
    inputs = draw_inputs(2)["video"] | {"frame_mask": torch.ones(2, 3, dtype=torch.bool)}
    backwards = {**inputs, "frames": inputs["frames"].flip(1)}
    for pooling, differs in (("transformer", True), ("mean", False)):
        tower = build_towers(run_config(video={"pooling": pooling})).towers["video"]
        here = torch.ones(2, dtype=torch.bool)
        assert (tower(inputs, here)[""] - tower(backwards, here)[""]).abs().max().item() > 1e-4 or not differs
        assert differs or torch.allclose(tower(inputs, here)[""], tower(backwards, here)[""], atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "transformer"])
def test_rows_without_any_content_are_finite_and_change_no_other_row(pooling: str) -> None:
    towers = build_towers(run_config(video={"pooling": pooling}))
    full = draw_inputs(3)
    empty = {modality: {name: tensor.clone() for name, tensor in of.items()} for modality, of in full.items()}
    empty["video"]["frame_mask"][1] = False
    empty["audio"]["num_samples"][1] = 0
    empty["text"]["token_mask"][1] = False
    embeddings = towers(empty, all_present(3))
    garbage = towers(hide_garbage(empty, all_present(3)), all_present(3))
    backward(towers, embeddings)
    for name in NAMES:
        assert torch.equal(embeddings[name], garbage[name])
        torch.testing.assert_close(embeddings[name].norm(dim=1), torch.ones(3))
        torch.testing.assert_close(
            embeddings[name][[0, 2]], towers(full, all_present(3))[name][[0, 2]], rtol=0, atol=1e-6
        )
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained(towers).values())


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    towers = build_towers(run_config())
    inputs = draw_inputs(5)
    together = towers(inputs, PRESENT)
    for row in range(5):
        own = {modality: {name: t[row : row + 1] for name, t in of.items()} for modality, of in inputs.items()}
        alone = towers(own, {name: mask[row : row + 1] for name, mask in PRESENT.items()})
        for name in NAMES:
            torch.testing.assert_close(alone[name][0], together[name][row], rtol=0, atol=1e-6)


@pytest.mark.parametrize("absent", [(), ("video",), ("audio",), ("text",), NAMES])
def test_every_trained_parameter_gets_a_gradient_whatever_is_absent(absent: tuple[str, ...]) -> None:
    towers = build_towers(run_config(video={"encoder": {**SIZES, "dropout": 0.1, "patch_dropout": 0.5}}))
    present = {name: mask & (name not in absent) for name, mask in PRESENT.items()}
    embeddings = towers(draw_inputs(5), present)
    backward(towers, embeddings)
    for name, parameter in trained(towers).items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.ndim >= 1, name  # DeepSpeed refuses others
        if name.endswith("projection.linear.weight"):
            assert parameter.grad.abs().max() > 0, name
    assert list(embeddings) == list(NAMES)
    assert len(trained(towers)) == len(list(towers.parameters()))


def test_bf16_computes_encoders_in_bf16_and_returns_float32_unit_rows() -> None:
    exact, halved = (build_towers(run_config(precision=precision)) for precision in ("fp32", "bf16"))
    inputs = draw_inputs(5)
    expected, found = exact(inputs, PRESENT), halved(inputs, PRESENT)
    backward(halved, found)
    for name in NAMES:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].norm(dim=1), torch.ones(5), rtol=0, atol=1e-6)
        cosines = (found[name] * expected[name]).sum(dim=1)
        assert cosines.min().item() > 0.99
        assert not torch.equal(found[name], expected[name])
    assert {p.dtype for p in halved.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained(halved).values())


def test_towers_are_called_in_a_fixed_order_inside_their_context() -> None:
    towers = build_towers(run_config())
    events: list[str] = []

    @contextmanager
    def around(name: str) -> Iterator[None]:
        events.append(f"enter {name}")
        yield
        events.append(f"leave {name}")

    for name in NAMES:
        towers.towers[name].register_forward_hook(lambda module, *_, name=name: events.append(f"call {name}"))
    towers(dict(reversed(draw_inputs(2).items())), all_present(2), around)
    assert events == [f"{event} {name}" for name in NAMES for event in ("enter", "call", "leave")]


def test_dropout_follows_the_random_generator_and_stops_in_evaluation() -> None:
    dropping = {**SIZES, "dropout": 0.3}
    video = {"encoder": {**dropping, "patch_dropout": 0.5}}
    towers = build_towers(run_config(video=video, audio={"encoder": dropping}, text={"encoder": dropping}))

    def draw(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        found: dict[str, Tensor] = towers(draw_inputs(2), all_present(2))
        return found

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in NAMES)
    towers.eval()
    first, other = draw(1), draw(2)
    assert all(torch.equal(first[name], other[name]) for name in NAMES)


def test_weights_come_from_the_seed() -> None:
    first, again, other = (dict(build_towers(run_config(), seed).named_parameters()) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    ast = build_towers(run_config()).towers["audio"].encoder.encoder.embeddings
    assert not torch.equal(ast.cls_token, ast.distillation_token)  # equal tokens would stay equal for ever


def test_batch_normalisation_is_refused_and_named() -> None:
    with pytest.raises(UserError, match=r"towers\.video: layer bn1 is BatchNorm2d.*freeze: true") as caught:
        build_towers(run_config(video={"encoder": "timm:resnet18", "pretrained": False}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoder", ["timm:resnet18", "timm:mobilenetv3_small_050"])
def test_a_frozen_encoder_stays_as_it_is(encoder: str) -> None:
    video = {"encoder": encoder, "pretrained": False, "freeze": True, "pooling": "transformer"}
    towers = build_towers(run_config(video=video)).train()
    frozen = towers.towers["video"].encoder.encoder
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    backward(towers, towers(draw_inputs(5), PRESENT))
    assert not any(module.training for module in frozen.modules())
    assert not trained(frozen)
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())
    own = trained(towers.towers["video"])
    assert any(name.startswith("encoder.over_time") for name in own)
    assert "projection.linear.weight" in own
    assert all(p.grad is not None for p in own.values())


@pytest.mark.parametrize(
    ("tower", "changes", "message"),
    [
        ("video", {"size_px": 40}, r"towers\.video\.size_px 40: expected a multiple of the encoder's patches, 16"),
        ("audio", {"num_mels": 40}, r"towers\.audio\.num_mels 40: .* 8 bands would never be heard"),
        ("audio", {"num_mels": 8}, r"patch_px 16: expected at most the 8 bands"),
        ("audio", {"hop_s": 1e-5}, r"at least one sample"),
        ("audio", {"fft_s": 2.0}, r"fft_s 2\.0: expected at most data\.window_s"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(tower: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_towers(run_config(**{tower: changes}))
    assert "\n" not in str(caught.value)


def test_parameter_groups_are_a_partition_by_what_decays() -> None:
    video = {"encoder": "timm:test_vit", "pretrained": False, "size_px": 32}
    towers = build_towers(run_config(video=video))
    names = {id(p): name for name, p in trained(towers).items()}
    decayed, kept = parameter_groups(towers, 0.05)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    order = [[names[id(p)] for p in group["params"]] for group in (decayed, kept)]
    assert sorted(order[0] + order[1]) == sorted(names.values())
    assert all(group == [name for name in names.values() if name in set(group)] for group in order)  # the model's order
    never = ("bias", "norm", "Norm", "_token", "pos_embed", "position_embeddings", "time_embedding", "token_type")
    assert [name for name in order[0] if any(part in name for part in never)] == []
    two_dimensional = [name for name in order[1] if trained(towers)[name].squeeze().ndim > 1]
    assert {name.split(".")[-1] if "weight" not in name else name.split(".")[-2] for name in two_dimensional} == {
        "pos_embed", "time_embedding", "position_embeddings",
    }  # fmt: skip
    for matrix in (
        "towers.text.encoder.encoder.embeddings.word_embeddings.weight",
        "towers.audio.projection.linear.weight",
    ):
        assert matrix in order[0]


def test_projection_of_a_zero_row_passes_a_zero_gradient() -> None:
    projection = Projection(4, 3)
    features = torch.tensor([[0.0] * 4, [1.0, -2.0, 0.5, 3.0], [1e-30] * 4], requires_grad=True)
    rows = projection(features)
    rows.square().sum(dim=1).sqrt()[1].backward(retain_graph=True)
    rows.sum().backward()
    assert torch.equal(rows[0], torch.zeros(3))
    torch.testing.assert_close(rows[1].norm(), torch.tensor(1.0))
    assert features.grad is not None
    assert torch.equal(features.grad[0], torch.zeros(4))
    assert features.grad.isfinite().all()
    expected = nn.functional.normalize(projection.linear(features[1:2]), dim=1)
    torch.testing.assert_close(rows[1:2], expected)


def test_projection_of_what_is_no_number_stays_none() -> None:
    """A row of zeros counts as missing: broken weights must not look like that."""
    features = torch.ones(2, 4)
    features[1, 2] = torch.nan
    rows = Projection(4, 3)(features)
    assert rows[0].norm().item() == pytest.approx(1.0)
    assert rows[1].isnan().all()


def test_empty_rows_of_a_mask_get_their_first_step() -> None:
    mask = torch.tensor([[0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    assert at_least_one(mask).tolist() == [[True, False, False], [False, True, True]]
    values = torch.tensor([[[1.0], [2.0], [3.0]], [[torch.nan], [4.0], [8.0]]])
    assert masked_mean(values, mask).tolist() == [[0.0], [6.0]]
