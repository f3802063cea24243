"""The audio tower: a spectrogram transformer (AST, arXiv 2104.01778) on log-mel energies."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int16, Int64
from torch import Tensor, nn

from data_pipeline.settings import UserError
from pretrain.config import AudioTowerConfig, TransformerConfig
from pretrain.towers.log_mel import LogMel, steps_in
from pretrain.towers.published import transformers_model
from pretrain.towers.torchvision_ops import allow_torchvision


class AudioTower(nn.Module):
    """Sound -> features [n, width]: the mean over all tokens of AST.

    AST has no attention mask: steps after the end of a sound hold a constant (see LogMel), as in its own training.
    `window_s`: length of the longest sound.

    Raises:
        UserError: the encoder cannot be had, or does not fit the spectrogram.
    """

    def __init__(self, config: AudioTowerConfig, window_s: float) -> None:
        super().__init__()
        _check_spectrogram(config, window_s)
        num_steps = steps_in(window_s, config.fft_s, config.hop_s, config.sample_rate_hz)
        if isinstance(config.encoder, TransformerConfig):
            self.encoder: Any = _ast(config.encoder, config.num_mels, num_steps)
        else:
            self.encoder = transformers_model(
                config.encoder.removeprefix("hf:"), config.pretrained, "towers.audio.encoder"
            )
            num_steps = _check_fits(self.encoder.config, config, num_steps)
            if not config.pretrained:
                _draw_positions(self.encoder)
        self.width = int(self.encoder.config.hidden_size)
        self.log_mel = LogMel(config.sample_rate_hz, config.num_mels, config.fft_s, config.hop_s, num_steps)

    def forward(
        self, waveform: Int16[Tensor, "clips samples"], num_samples: Int64[Tensor, " clips"]
    ) -> Float[Tensor, "clips features"]:
        """int16 mono sound and the valid length of each row."""
        tokens: Tensor = self.encoder(self.log_mel(waveform, num_samples)).last_hidden_state
        return tokens.float().mean(dim=1)


def _check_spectrogram(config: AudioTowerConfig, window_s: float) -> None:
    """Refuse lengths that leave no samples in a step, or no step in the window."""
    if min(config.hop_s, config.fft_s) * config.sample_rate_hz < 1:
        raise UserError(f"towers.audio.hop_s {config.hop_s}, fft_s {config.fft_s}: expected at least one sample each")
    if window_s < config.fft_s:
        raise UserError(f"towers.audio.fft_s {config.fft_s}: expected at most data.window_s, {window_s}")


def _check_fits(published: object, config: AudioTowerConfig, num_steps: int) -> int:
    """The number of steps a published model was made for.

    Raises:
        UserError: it is no AST, or was made for other spectrograms.
    """
    kind = getattr(published, "model_type", "unknown")
    if kind != "audio-spectrogram-transformer":
        raise UserError(
            f"towers.audio.encoder {config.encoder}: expected an audio-spectrogram-transformer, found {kind}"
        )
    bands, steps = getattr(published, "num_mel_bins", 0), getattr(published, "max_length", 0)
    if bands != config.num_mels:
        raise UserError(f"towers.audio.num_mels {config.num_mels}: {config.encoder} was made for {bands}")
    if num_steps > steps:
        raise UserError(f"data.window_s: {num_steps} spectrogram steps; {config.encoder} takes at most {steps}")
    return int(steps)


def _ast(config: TransformerConfig, num_mels: int, num_steps: int) -> nn.Module:
    if config.patch_px > min(num_mels, num_steps):
        raise UserError(
            f"towers.audio.encoder.patch_px {config.patch_px}: expected at most the {num_mels} bands and "
            f"{num_steps} steps of the spectrogram"
        )
    if num_mels % config.patch_px:
        raise UserError(
            f"towers.audio.num_mels {num_mels}: expected a multiple of encoder.patch_px {config.patch_px}; the highest "
            f"{num_mels % config.patch_px} bands would never be heard"
        )
    allow_torchvision()
    from transformers import ASTConfig, ASTModel

    model = ASTModel(
        ASTConfig(
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=round(config.width * config.mlp_ratio),
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=0.0,
            patch_size=config.patch_px,
            frequency_stride=config.patch_px,
            time_stride=config.time_stride,
            max_length=num_steps,
            num_mel_bins=num_mels,
        )
    )
    assert isinstance(model, nn.Module)
    _draw_positions(model)
    return model


def _draw_positions(model: Any) -> None:
    """Random tokens and positions, as the authors' code draws them (YuanGongND/ast: trunc_normal_, std 0.02).

    transformers leaves them at zero; its two class tokens would then stay equal for ever.
    """
    for name in ("cls_token", "distillation_token", "position_embeddings"):
        nn.init.trunc_normal_(getattr(model.embeddings, name), std=0.02)
