"""Log-mel energies against their definition in float64 numpy and against AST's published feature extractor."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pretrain.towers.log_mel import MEAN, STD, LogMel, steps_in
from pretrain.towers.torchvision_ops import allow_torchvision

RATE_HZ = 16_000


def sound(num_samples: int, seed: int = 0) -> NDArray[np.int16]:
    """A tone that rises in noise."""
    time_s = np.arange(num_samples) / RATE_HZ
    tone = 8000 * np.sin(2 * np.pi * (300 + 900 * time_s) * time_s)
    noise = np.random.default_rng(seed).normal(0, 500, num_samples)
    return (tone + noise + 200).astype(np.int16)


def mel(frequency_hz: float | NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1127 * np.log(1 + np.asarray(frequency_hz) / 700))


def reference(waveform: NDArray[np.int16], num_mels: int, fft_s: float, hop_s: float) -> NDArray[np.float64]:
    """From the definition, a step and a band at a time."""
    length, hop = round(fft_s * RATE_HZ), round(hop_s * RATE_HZ)
    num_bins = 2 ** int(np.ceil(np.log2(length)))
    bins = mel(np.arange(num_bins // 2 + 1) * RATE_HZ / num_bins)
    edges = np.linspace(mel(20.0), mel(RATE_HZ / 2), num_mels + 2)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length - 1))
    steps = []
    for start in range(0, len(waveform) - length + 1, hop):
        frame = waveform[start : start + length] / 32768
        frame = frame - frame.mean()
        emphasised = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(emphasised * window, num_bins)) ** 2
        energies = []
        for left, centre, right in zip(edges[:-2], edges[1:-1], edges[2:], strict=True):
            triangle = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clip(0)
            energies.append(np.log(max(float(power @ triangle), 2.0**-23)))
        steps.append(energies)
    return (np.array(steps) - -4.2677393) / (2 * 4.5689974)


@pytest.mark.parametrize(("num_mels", "fft_s", "hop_s"), [(48, 0.04, 0.02), (64, 0.025, 0.01)])
def test_equals_the_definition(num_mels: int, fft_s: float, hop_s: float) -> None:
    waveform = sound(RATE_HZ)
    num_steps = steps_in(1.0, fft_s, hop_s, RATE_HZ)
    found = LogMel(RATE_HZ, num_mels, fft_s, hop_s, num_steps)(
        torch.from_numpy(waveform)[None], torch.tensor([RATE_HZ])
    )
    expected = reference(waveform, num_mels, fft_s, hop_s)
    assert found.dtype == torch.float32
    assert found.shape == (1, *expected.shape)
    assert np.abs(found[0].numpy() - expected).max() < 1e-4  # float32 against float64


def test_equals_the_published_feature_extractor() -> None:
    allow_torchvision()
    from transformers import ASTFeatureExtractor

    waveform = sound(20_000)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="At least one mel filter")  # of the extractor itself
        extractor = ASTFeatureExtractor()
    expected = extractor(waveform / 32768, sampling_rate=RATE_HZ, return_tensors="pt")["input_values"]
    found = LogMel(RATE_HZ, 128, 0.025, 0.010, 1024)(torch.from_numpy(waveform)[None], torch.tensor([20_000]))
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-3)


def test_steps_after_the_end_hold_a_constant_whatever_lies_there() -> None:
    log_mel = LogMel(RATE_HZ, 32, 0.025, 0.01, steps_in(1.0, 0.025, 0.01, RATE_HZ))
    lengths = torch.tensor([RATE_HZ, 4000, 399, 0])
    rows = torch.from_numpy(np.stack([sound(RATE_HZ)] * 4))
    garbage = torch.where(torch.arange(RATE_HZ) < lengths[:, None], rows, torch.full_like(rows, -32768))
    found = log_mel(rows, lengths)
    assert torch.equal(found, log_mel(garbage, lengths))
    constant = np.float32(-MEAN / (2 * STD))
    kept = [98, 1 + (4000 - 400) // 160, 0, 0]
    for row, num_steps in enumerate(kept):
        assert torch.equal(found[row, :num_steps], found[0, :num_steps])
        assert np.abs(found[row, num_steps:].numpy() - constant).max(initial=0) < 1e-6
    assert found.isfinite().all()


def test_a_shorter_tensor_is_a_shorter_sound() -> None:
    log_mel = LogMel(RATE_HZ, 32, 0.025, 0.01, 98)
    short, whole = sound(RATE_HZ)[:5000], np.pad(sound(RATE_HZ)[:5000], (0, RATE_HZ - 5000))
    length = torch.tensor([5000])
    assert torch.equal(log_mel(torch.from_numpy(short)[None], length), log_mel(torch.from_numpy(whole)[None], length))


def test_autocast_does_not_reach_the_spectrogram() -> None:
    log_mel = LogMel(RATE_HZ, 32, 0.025, 0.01, 98)
    waveform, length = torch.from_numpy(sound(RATE_HZ))[None], torch.tensor([RATE_HZ])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = log_mel(waveform, length)
    assert torch.equal(found, log_mel(waveform, length))
    assert list(log_mel.state_dict()) == []


def test_digital_silence_is_finite() -> None:
    found = LogMel(RATE_HZ, 32, 0.025, 0.01, 98)(torch.zeros(1, RATE_HZ, dtype=torch.int16), torch.tensor([RATE_HZ]))
    assert found.isfinite().all()
    assert found.unique().numel() == 1
