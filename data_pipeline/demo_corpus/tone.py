"""Sound of a clip of the demo corpus: a timbre whose pitch follows a contour, in a rhythm."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_pipeline.demo_corpus.factors import Sound

RATE_HZ, DURATION_S = 48_000, 4.0
FADE_S = 0.01
WIND_HZ = 300.0

Wave = NDArray[np.float64]


def waveform(sound: Sound, generator: np.random.Generator) -> NDArray[np.float32]:
    """Mono samples in [-1, 1], float32 [RATE_HZ * DURATION_S]."""
    times = np.arange(int(RATE_HZ * DURATION_S)) / RATE_HZ
    pitch_hz = _pitch(sound.contour, times, generator)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / RATE_HZ
    wave = _timbre(sound.timbre, phase, generator) * _envelope(sound.rhythm, times, generator)
    level = generator.uniform(0.35, 0.7)
    wave = level * wave / max(1e-9, abs(wave).max()) + generator.normal(0, 0.002, len(times))
    return wave.clip(-1, 1).astype(np.float32)


def _pitch(contour: str, times: Wave, generator: np.random.Generator) -> Wave:
    share = times / DURATION_S
    low = generator.uniform(260, 420)
    high = low * generator.uniform(2.6, 3.4)
    if contour == "steady":
        return np.full_like(times, generator.uniform(low, high))
    if contour == "rising":
        return low * (high / low) ** share
    if contour == "falling":
        return high * (low / high) ** share
    speed_hz, phase = generator.uniform(0.9, 1.3), generator.uniform(0, 2 * np.pi)
    middle = np.sqrt(low * high)
    return np.asarray(middle * 2 ** np.sin(2 * np.pi * speed_hz * times + phase))


def _timbre(timbre: str, phase: Wave, generator: np.random.Generator) -> Wave:
    if timbre == "pure":
        return np.sin(phase)
    if timbre == "buzz":
        return np.sum([np.sin(n * phase) / n for n in range(1, 11)], axis=0)
    if timbre == "metal":
        partials = ((1.0, 1.0), (2.76, 0.8), (5.40, 0.6))  # of a struck bar
        return np.sum([weight * np.sin(ratio * phase) for ratio, weight in partials], axis=0)
    # A band of noise around the pitch: its two quadratures are noise of a few hundred hertz. The skirts fall steeply,
    # or they would hide how the pitch moves.
    points = np.linspace(0, len(phase), int(WIND_HZ * DURATION_S))
    across, along = (np.interp(np.arange(len(phase)), points, generator.normal(size=len(points))) for _ in range(2))
    return np.asarray(along * np.cos(phase) + across * np.sin(phase))


def _envelope(rhythm: str, times: Wave, generator: np.random.Generator) -> Wave:
    edges = np.minimum(1, np.minimum(times, DURATION_S - times) / FADE_S)
    if rhythm == "continuous":
        return edges
    if rhythm == "swelling":
        return np.asarray(edges * 0.02 ** (1 - times / DURATION_S))
    rate_hz = generator.uniform(1.1, 1.5) if rhythm == "slow" else generator.uniform(4.0, 5.0)
    place = (times * rate_hz + generator.uniform(0, 1)) % 1
    return np.asarray(edges * np.clip(np.minimum(place, 0.5 - place) / (FADE_S * rate_hz), 0, 1))
