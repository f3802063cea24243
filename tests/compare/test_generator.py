"""The synthetic modalities are what the config says: better ones tell more, views share a latent, seeds differ."""

from __future__ import annotations

import torch

from pretrain.compare.config import EventsConfig, MixtureConfig
from pretrain.compare.generator import SyntheticData, draw_data, noise_levels
from pretrain.compare.readout import accuracy

NAMES = ("x1", "x2", "x3", "x4")
MIXTURE = MixtureConfig(num_components=8, latent_dim=6, observed_dim=16, num_train=800, num_test=400, noise_worst=4.0)


def readable(data: SyntheticData, name: str) -> float:
    """How well the label can be told from what is observed."""
    train, test = data.train, data.test
    return accuracy("linear", (train.observed[name], train.labels), (test.observed[name], test.labels), 8)


def test_quality_rises_from_first_to_last() -> None:
    found = [sum(readable(draw_data(MIXTURE, NAMES, seed), name) for seed in range(3)) for name in NAMES]
    assert found == sorted(found)
    assert found[3] > found[0] + 0.5


def test_noise_levels_are_a_geometric_series() -> None:
    levels = noise_levels(MIXTURE, 4)
    assert levels[0] == 4.0
    assert torch.allclose(torch.tensor(levels[1:]) / torch.tensor(levels[:-1]), torch.tensor((0.3 / 4.0) ** (1 / 3)))


def test_the_second_view_is_the_same_latent_with_noise_of_its_own() -> None:
    data = draw_data(MIXTURE, NAMES, 0)
    for name, level in zip(NAMES, noise_levels(MIXTURE, 4), strict=True):
        difference = data.train.observed[name] - data.train.again[name]
        assert abs(difference.std() / (2**0.5 * level) - 1) < 0.05


def test_a_seed_is_a_dataset_and_the_global_generator_stays_as_it_was() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (draw_data(MIXTURE, NAMES, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.train.observed["x1"], again.train.observed["x1"])
    assert torch.equal(first.test.labels, again.test.labels)
    assert not torch.equal(first.train.observed["x1"], other.train.observed["x1"])


def test_train_and_test_are_of_one_draw_of_the_networks() -> None:
    data = draw_data(MIXTURE.model_copy(update={"separation": 3.0}), NAMES, 0)
    assert (len(data.train.labels), len(data.test.labels)) == (800, 400)
    assert readable(data, "x4") > 0.8  # a classifier of the training samples knows the test samples


def test_events_text_tells_both_video_and_audio_tell_one_each() -> None:
    events = EventsConfig(num_components=4, latent_dim=4, observed_dim=32, num_train=1500, num_test=500, noise=0.05)
    data = draw_data(events, ("video", "audio", "text"), 0)

    def explained(source: str, target: str) -> float:
        """Share of the variance of one modality's test vectors that a linear map of another's explains."""
        coefficients = torch.linalg.lstsq(data.train.observed[source], data.train.observed[target]).solution
        rest = data.test.observed[target] - data.test.observed[source] @ coefficients
        return 1 - float(rest.var() / data.test.observed[target].var())

    assert explained("text", "video") > 0.4
    assert explained("text", "audio") > 0.4
    assert explained("video", "audio") < 0.1
