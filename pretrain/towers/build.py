"""All towers of a run behind one call, and the parameter groups of its optimizer."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data_pipeline.settings import Settings, UserError
from pretrain.config import RunConfig, TowerConfig, TowersConfig
from pretrain.data.tokenize import Tokenizer
from pretrain.heads.projection import Projection
from pretrain.towers.audio import AudioTower
from pretrain.towers.text import TextTower
from pretrain.towers.video import VideoTower

Around = Callable[[str], AbstractContextManager[None]]
# Parts of names: ViT and AST, BERT, CLIP and our own pooling, Swin.
NOT_DECAYED = (
    "_token", "pos_embed", "position_embedding", "token_type_embeddings", "time_embedding", "relative_position",
)  # fmt: skip


class ModelConfig(Settings):
    """What the towers of a run are built from; an export keeps this much of a run's config."""

    towers: TowersConfig
    window_s: PositiveFloat
    embedding_dim: PositiveInt
    precision: Literal["fp32", "bf16"]
    independent: bool = False  # each tower has a second projection, whose embeddings are trained beside (not exported)

    @classmethod
    def of(cls, config: RunConfig) -> ModelConfig:
        """The part of a run's config that its towers depend on."""
        return ModelConfig(
            towers=config.towers,
            window_s=config.data.window_s,
            embedding_dim=config.embedding_dim,
            precision=config.train.precision,
            independent="independent" in config.views,
        )


class Tower(nn.Module):
    """An encoder of one modality with its projection: inputs -> fp32 unit rows [n, D], maybe of a second one, too.

    A sample that lacks the modality gets constant inputs, so that every parameter takes part in every call and nothing
    behind its mask has an effect. A frozen encoder (`encoder.encoder`; pooling over time is ours and is trained) stays
    in evaluation mode.

    Raises:
        UserError: the encoder has batch normalisation and is not frozen.
    """

    encoder: VideoTower | AudioTower | TextTower

    def __init__(
        self, name: str, encoder: VideoTower | AudioTower | TextTower, own: TowerConfig, model: ModelConfig
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = Projection(encoder.width, model.embedding_dim)
        self.independent = Projection(encoder.width, model.embedding_dim) if model.independent else None
        self.frozen = own.freeze
        self.autocast = model.precision == "bf16"
        if own.freeze:
            encoder.encoder.requires_grad_(False).eval()
        else:
            _refuse_batch_norm(name, encoder.encoder)

    def train(self, mode: bool = True) -> Tower:
        """Switch training mode; a frozen encoder keeps evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.encoder.eval()
        return self

    def forward(self, inputs: dict[str, Tensor], present: Tensor) -> dict[str, Tensor]:
        """inputs as in `Batch.inputs[modality]`, present [n] -> {"": [n, D]}, and "@independent" where there is one"""
        known = {name: _constant_where_absent(tensor, present) for name, tensor in inputs.items()}
        with torch.autocast(present.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            features = self.encoder(**known)
        embeddings = {"": self.projection(features)}
        return embeddings if self.independent is None else {**embeddings, "@independent": self.independent(features)}


class Towers(nn.Module):
    """The towers of a run, always called all and in the same order."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.names = config.towers.names
        self.towers = nn.ModuleDict({name: build_tower(name, config) for name in self.names})

    def forward(
        self, inputs: dict[str, dict[str, Tensor]], present: dict[str, Tensor], around: Around | None = None
    ) -> dict[str, Tensor]:
        """{modality: [n, D]}, and {modality@independent: [n, D]} where towers have that projection; `around(name)` is
        entered for the call of each tower."""
        found: dict[str, Tensor] = {}
        for name in self.names:
            with nullcontext() if around is None else around(name):
                embeddings = self.towers[name](inputs[name], present[name])
            found |= {f"{name}{view}": rows for view, rows in embeddings.items()}
        return found


def build_tower(name: str, config: ModelConfig) -> Tower:
    """The tower of a modality, with published weights or with weights from torch's current random state.

    Built under `torch.no_grad()` it is not asked which of its parameters can be trained.

    Raises:
        UserError: the encoder or its weights cannot be had, or do not fit.
    """
    encoder: VideoTower | AudioTower | TextTower
    if name == "video":
        assert config.towers.video is not None
        encoder = VideoTower(config.towers.video)
    elif name == "audio":
        assert config.towers.audio is not None
        encoder = AudioTower(config.towers.audio, config.window_s)
    else:
        assert config.towers.text is not None
        tokenizer = Tokenizer(config.towers.text.tokenizer, config.towers.text.max_tokens)
        encoder = TextTower(config.towers.text, tokenizer.vocab_size)
    own: TowerConfig = getattr(config.towers, name)
    tower = Tower(name, encoder, own, config)
    if isinstance(own.encoder, str) and torch.is_grad_enabled():
        _freeze_unused(name, tower, config)
    return tower


def _constant_where_absent(tensor: Tensor, present: Tensor) -> Tensor:
    """Zeros in absent rows: black, silence, no token."""
    return torch.where(present.view(-1, *[1] * (tensor.ndim - 1)), tensor, torch.zeros_like(tensor))


def _refuse_batch_norm(name: str, encoder: nn.Module) -> None:
    for place, module in encoder.named_modules():
        if isinstance(module, _BatchNorm):
            raise UserError(
                f"towers.{name}: layer {place} is {type(module).__name__}, whose output depends on which samples "
                "share a chunk; expected an encoder without batch normalisation, or freeze: true"
            )


def example_inputs(name: str, config: ModelConfig) -> dict[str, Tensor]:
    """One sample of zeros as the loader would give it."""
    if name == "video":
        video = config.towers.video
        assert video is not None
        frames = torch.zeros(1, video.num_frames, video.size_px, video.size_px, 3, dtype=torch.uint8)
        return {"frames": frames, "frame_mask": torch.ones(1, video.num_frames, dtype=torch.bool)}
    if name == "audio":
        audio = config.towers.audio
        assert audio is not None
        length = round(config.window_s * audio.sample_rate_hz)
        return {"waveform": torch.zeros(1, length, dtype=torch.int16), "num_samples": torch.tensor([length])}
    text = config.towers.text
    assert text is not None
    ids = torch.zeros(1, text.max_tokens, dtype=torch.int64)
    return {"token_ids": ids, "token_mask": torch.ones(1, text.max_tokens, dtype=torch.bool)}


def _freeze_unused(name: str, tower: Tower, config: ModelConfig) -> None:
    """Published models carry parameters our use of them never reaches (poolers, mask tokens): not to be trained.

    Raises:
        UserError: the model cannot be called as the encoder of this modality.
    """
    try:
        outputs = tower(example_inputs(name, config), torch.ones(1, dtype=torch.bool))
        torch.stack([rows.sum() for rows in outputs.values()]).sum().backward()
    except Exception as error:  # any architecture's own way to say no
        raise UserError(
            f"towers.{name}.encoder {getattr(config.towers, name).encoder}: cannot encode {name} of this config "
            f"({textwrap.shorten(str(error), 200) or type(error).__name__}); expected a model of {name} alone"
        ) from error
    unused = [place for place, p in tower.named_parameters() if p.requires_grad and p.grad is None]
    for place in unused:
        tower.get_parameter(place).requires_grad_(False)
    tower.zero_grad(set_to_none=True)
    if unused:
        logging.getLogger(__name__).info("towers.%s: not trained, because never used: %s", name, ", ".join(unused))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups over the trainable parameters, each once, in the model's order: decayed, then not decayed.

    Not decayed: vectors and scalars (norms, biases, temperatures), learned tokens, embeddings of position, time and
    segment.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            keep = parameter.ndim < 2 or any(part in name for part in NOT_DECAYED)
            (kept if keep else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
