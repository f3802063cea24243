"""Encoders by name: `timm:NAME` and `hf:NAME_OR_FOLDER`, with published weights where they can be had.

Weights are read from safetensors only, and no code from a hub is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from data_pipeline.settings import UserError, nearest
from pretrain.towers.torchvision_ops import allow_torchvision


def timm_model(name: str, pretrained: bool, size_px: int) -> nn.Module:
    """timm's image model `name` without classifier, for pictures of `size_px`.

    Raises:
        UserError: no such model, or its weights cannot be had.
    """
    allow_torchvision()
    import timm
    from timm.models import get_pretrained_cfg

    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise UserError(f"encoder timm:{name}: no such model; {_closest(architecture, timm.list_models())}")
    published = get_pretrained_cfg(name)
    size = {"img_size": size_px} if published is not None and published.fixed_input_size else {}
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **size)
    except Exception as error:  # hubs and caches raise whatever they like
        if not pretrained:
            raise
        raise UserError(_no_weights(f"timm:{name}", error)) from error
    assert isinstance(model, nn.Module)
    return model


def transformers_model(location: str, pretrained: bool) -> Any:
    """The transformers model of a folder or a name: with its weights, or random ones of the same architecture.

    Raises:
        UserError: the folder, the config or the weights cannot be had.
    """
    allow_torchvision()
    from transformers import AutoConfig, AutoModel

    if location.startswith((".", "/", "~")) and not Path(location).is_dir():
        raise UserError(f"encoder hf:{location}: no such folder")
    try:
        if pretrained:
            return AutoModel.from_pretrained(location, use_safetensors=True, trust_remote_code=False)
        return AutoModel.from_config(AutoConfig.from_pretrained(location), trust_remote_code=False)
    except Exception as error:  # hubs, caches and parsers raise whatever they like
        raise UserError(_no_weights(f"hf:{location}", error)) from error


def _no_weights(encoder: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return (
        f"encoder {encoder}: its published weights cannot be had ({reason}); expected a cached or reachable model; "
        "use a local folder, or pretrained: false for random weights"
    )


def _closest(name: str, names: list[str]) -> str:
    clause = nearest(name, names)
    return clause.split("(valid:")[0].strip() or "see timm.list_models()"
