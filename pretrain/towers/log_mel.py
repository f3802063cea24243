"""Log-mel energies as Kaldi's filter bank and the AST feature extractor define them, on the device of the tower."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Int16, Int64
from torch import Tensor, nn

# Published with AST (arXiv 2104.01778): mean and standard deviation over AudioSet; features are divided by twice the
# deviation. Steps without sound hold 0 before that, as AST's padding does.
MEAN, STD = -4.2677393, 4.5689974
PREEMPHASIS, MIN_HZ, FLOOR, FULL_SCALE = 0.97, 20.0, 1.192092955078125e-07, 32768.0


class LogMel(nn.Module):
    """int16 mono waveform [n, samples] -> normalised log-mel energies [n, num_steps, num_mels], float32.

    Steps: no padding at the edges; mean removed, pre-emphasis, symmetric Hann window, power spectrum, triangles on
    Kaldi's mel scale (HTK's, 1127 ln(1 + f/700); triangular in mel) from 20 Hz to half the sample rate, natural log.
    One normalisation for all encoders, published or not: about zero mean and a deviation of 0.5 on AudioSet.
    """

    filters: Tensor
    window: Tensor

    def __init__(self, sample_rate_hz: int, num_mels: int, fft_s: float, hop_s: float, num_steps: int) -> None:
        super().__init__()
        from transformers.audio_utils import mel_filter_bank

        self.frame = round(fft_s * sample_rate_hz)
        self.hop = round(hop_s * sample_rate_hz)
        self.num_steps = num_steps
        self.fft = 1 << (self.frame - 1).bit_length()
        with warnings.catch_warnings():
            # AST's own 128 bands leave one without a frequency; such a band is constant and does no harm.
            warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
            filters = mel_filter_bank(
                num_frequency_bins=self.fft // 2 + 1,
                num_mel_filters=num_mels,
                min_frequency=MIN_HZ,
                max_frequency=sample_rate_hz / 2,
                sampling_rate=sample_rate_hz,
                norm=None,
                mel_scale="kaldi",
                triangularize_in_mel_space=True,
            )
        self.register_buffer("filters", torch.tensor(filters, dtype=torch.float32), persistent=False)
        self.register_buffer("window", torch.hann_window(self.frame, periodic=False), persistent=False)

    def forward(
        self, waveform: Int16[Tensor, "clips samples"], num_samples: Int64[Tensor, " clips"]
    ) -> Float[Tensor, "clips steps mels"]:
        """`num_samples`: valid length of each row; steps that reach past it are padding."""
        with torch.autocast(waveform.device.type, enabled=False):
            needed = (self.num_steps - 1) * self.hop + self.frame
            sound = nn.functional.pad(waveform.float() / FULL_SCALE, (0, max(0, needed - waveform.shape[1])))
            frames = self._framed(sound[:, :needed])
            spectrum = torch.fft.rfft(frames, n=self.fft)
            power = spectrum.real.square() + spectrum.imag.square()  # several times faster than a sum over pairs
            energies = (power @ self.filters).clamp_min(FLOOR).log()
            ends = torch.arange(self.num_steps, device=waveform.device) * self.hop + self.frame
            inside = (ends[None] <= num_samples[:, None])[:, :, None]
            energies = torch.where(inside, energies, torch.zeros_like(energies))
            return (energies - MEAN) / (2 * STD)

    def _framed(self, sound: Float[Tensor, "clips samples"]) -> Float[Tensor, "clips steps frame"]:
        """Windowed frames: each without its mean m, then y[t] = x[t] - p x[t - 1] within the frame, x[-1] = x[0].

        Pre-emphasis of the whole sound at once gives y[t] + (1 - p) m for t > 0, which spares passes over the frames.
        """
        emphasised = sound.clone()
        emphasised[:, 1:] -= PREEMPHASIS * sound[:, :-1]
        plain = sound.unfold(1, self.frame, self.hop)
        mean = plain.mean(dim=2, keepdim=True)
        frames = emphasised.unfold(1, self.frame, self.hop) - (1 - PREEMPHASIS) * mean
        frames[..., 0] = (1 - PREEMPHASIS) * (plain[..., 0] - mean[..., 0])
        return frames.mul_(self.window)


def steps_in(window_s: float, fft_s: float, hop_s: float, sample_rate_hz: int) -> int:
    """Whole frames in a window of sound."""
    return 1 + (round(window_s * sample_rate_hz) - round(fft_s * sample_rate_hz)) // round(hop_s * sample_rate_hz)
