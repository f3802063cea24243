"""Vectors in the place of media: modalities made from a latent variable by fixed random networks, plus noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pretrain.compare.config import EventsConfig, MixtureConfig
from pretrain.randomness import keyed_random

HIDDEN_DIM = 64  # of the networks that make modalities
GAIN = 1.5  # of their inputs: enough for the tanh to bend

Latents = Float[Tensor, "samples latent"]
Observed = Float[Tensor, "samples observed"]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """observed: a modality's vectors; again: the same latents seen a second time, with other noise."""

    observed: dict[str, Observed]
    again: dict[str, Observed]
    labels: Int[Tensor, " samples"]

    def rows(self, start: int, stop: int) -> Samples:
        """Some of them."""
        return Samples(
            observed={name: rows[start:stop] for name, rows in self.observed.items()},
            again={name: rows[start:stop] for name, rows in self.again.items()},
            labels=self.labels[start:stop],
        )


@dataclass(frozen=True, kw_only=True)
class SyntheticData:
    """One draw of a generator's networks, and samples of it."""

    train: Samples
    test: Samples


def draw_data(generator: MixtureConfig | EventsConfig, modalities: tuple[str, ...], seed: int) -> SyntheticData:
    """Training and test samples: a function of the generator, the number of modalities and the seed."""
    num_samples = generator.num_train + generator.num_test
    with keyed_random("comparison data", seed, len(modalities)):
        if isinstance(generator, EventsConfig):
            seen, labels = _mixture(num_samples, generator)
            heard, _ = _mixture(num_samples, generator)
            latents = {"video": seen, "audio": heard, "text": torch.cat([seen, heard], dim=1)}
            noises = dict.fromkeys(modalities, generator.noise)
        else:
            latent, labels = _mixture(num_samples, generator)
            latents = dict.fromkeys(modalities, latent)
            noises = dict(zip(modalities, noise_levels(generator, len(modalities)), strict=True))
        samples = _observe(latents, noises, labels, generator.observed_dim)
    return SyntheticData(
        train=samples.rows(0, generator.num_train), test=samples.rows(generator.num_train, num_samples)
    )


def noise_levels(generator: MixtureConfig, num_modalities: int) -> list[float]:
    """Standard deviation of the noise of each modality, the worst first, at equal ratios."""
    worst, best = generator.noise_worst, generator.noise_best
    steps = [m / (num_modalities - 1) for m in range(num_modalities)]
    return [worst * math.exp(step * math.log(best / worst)) for step in steps]


def _mixture(num_samples: int, generator: MixtureConfig | EventsConfig) -> tuple[Latents, Int[Tensor, " samples"]]:
    means = generator.separation * torch.randn(generator.num_components, generator.latent_dim)
    labels = torch.randint(generator.num_components, (num_samples,))
    return means[labels] + torch.randn(num_samples, generator.latent_dim), labels


def _observe(latents: Mapping[str, Latents], noises: Mapping[str, float], labels: Tensor, dim: int) -> Samples:
    clean = {name: _project(latent, dim) for name, latent in latents.items()}
    first, second = (
        {name: rows + noises[name] * torch.randn_like(rows) for name, rows in clean.items()} for _ in range(2)
    )
    return Samples(observed=first, again=second, labels=labels)


def _project(latent: Latents, dim: int) -> Observed:
    """A random network's outputs, each with mean 0 and variance 1."""
    scale = GAIN / (latent.std() * math.sqrt(latent.shape[1]))
    hidden = torch.tanh(scale * latent @ torch.randn(latent.shape[1], HIDDEN_DIM))
    outputs = hidden @ torch.randn(HIDDEN_DIM, dim)
    return (outputs - outputs.mean(dim=0)) / outputs.std(dim=0)
