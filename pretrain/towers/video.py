"""The video tower: an image encoder on each frame, then pooling over time."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from data_pipeline.settings import UserError
from pretrain.config import TransformerConfig, VideoTowerConfig
from pretrain.towers.masks import at_least_one, masked_mean
from pretrain.towers.published import timm_model
from pretrain.towers.torchvision_ops import allow_torchvision

HALF = (0.5, 0.5, 0.5)


class VideoTower(nn.Module):
    """Frames -> features [n, width]. Frames behind a false mask change nothing.

    `encoder` sees each frame alone; `over_time`, if any, sees them all and is always trained.

    Raises:
        UserError: the encoder cannot be had, or does not fit the size of the pictures.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VideoTowerConfig) -> None:
        super().__init__()
        if isinstance(config.encoder, TransformerConfig):
            self.encoder: Any = _vit(config.encoder, config.size_px)
            self.width, mean, std = config.encoder.width, HALF, HALF
        else:
            self.encoder = timm_model(
                config.encoder.removeprefix("timm:"), config.pretrained, config.size_px, "towers.video.encoder"
            )
            patches = getattr(self.encoder, "patch_embed", None)
            _check_patches(config.size_px, getattr(patches, "patch_size", (1, 1))[0])
            self.width = int(getattr(self.encoder, "head_hidden_size", None) or self.encoder.num_features)
            mean, std = (self.encoder.pretrained_cfg.get(key, HALF) for key in ("mean", "std"))
        self.register_buffer("mean", torch.tensor(mean) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std) * 255, persistent=False)
        self.over_time = _OverTime(self.width, config.num_frames) if config.pooling == "transformer" else None

    def forward(
        self, frames: UInt8[Tensor, "samples time height width 3"], frame_mask: Bool[Tensor, "samples time"]
    ) -> Float[Tensor, "samples features"]:
        """uint8 RGB frames and which of them count; a row where none does gives the features of black frames."""
        pictures = torch.where(frame_mask[:, :, None, None, None], frames, torch.zeros_like(frames))
        pictures = ((pictures.flatten(0, 1).float() - self.mean) / self.std).permute(0, 3, 1, 2)
        features = self.encoder(pictures.contiguous()).unflatten(0, frames.shape[:2])
        frame_mask = at_least_one(frame_mask)
        if self.over_time is not None:
            features = self.over_time(features, frame_mask)
        return masked_mean(features, frame_mask)


class _OverTime(nn.Module):
    """One pre-norm transformer layer over frames that know their place; masked frames are not attended to."""

    def __init__(self, width: int, num_frames: int) -> None:
        super().__init__()
        self.time_embedding = nn.Parameter(torch.randn(1, num_frames, width) * 0.02)
        heads = next(heads for heads in (8, 4, 2, 1) if width % heads == 0)
        self.layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, frame_mask: Tensor) -> Tensor:
        features = features + self.time_embedding
        bias = torch.zeros(frame_mask.shape, dtype=features.dtype, device=features.device)
        output: Tensor = self.norm(self.layer(features, src_key_padding_mask=bias.masked_fill(~frame_mask, -torch.inf)))
        return output


def _check_patches(size_px: int, patch_px: int) -> None:
    """Refuse a size whose border would be in no patch."""
    if size_px % patch_px:
        raise UserError(f"towers.video.size_px {size_px}: expected a multiple of the encoder's patches, {patch_px}")


def _vit(config: TransformerConfig, size_px: int) -> nn.Module:
    _check_patches(size_px, config.patch_px)
    allow_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=size_px,
        patch_size=config.patch_px,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=0,
        global_pool="avg",
        class_token=False,
        pos_drop_rate=config.dropout,
        proj_drop_rate=config.dropout,
        patch_drop_rate=config.patch_dropout,
    )
    assert isinstance(model, nn.Module)
    return model
