"""Encoders by name: `timm:NAME` and `hf:NAME_OR_FOLDER`, with published weights where they can be had.

Weights are read from safetensors only, as float32, and no code from a hub is run. What is in the local cache is taken
from there; only what is not is asked of the Hugging Face hub.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipeline.settings import UserError, nearest
from pretrain.hub import cache_then_hub
from pretrain.towers.torchvision_ops import allow_torchvision


def timm_model(name: str, pretrained: bool, size_px: int, place: str) -> nn.Module:
    """timm's image model `name` without classifier, for pictures of `size_px`. `place`: the config key, for errors.

    Raises:
        UserError: no such model, its weights cannot be had, or it cannot take pictures of this size.
    """
    allow_torchvision()
    import timm
    from timm.models import get_pretrained_cfg

    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise UserError(f"{place} timm:{name}: no such model; {_closest(architecture, timm.list_models())}")
    if "." in name and not timm.models.is_model_pretrained(name):
        tagged = timm.list_models(f"{architecture}.*", pretrained=True)
        raise UserError(f"{place} timm:{name}: no such published weights; {_closest(name, tagged)}")
    published = get_pretrained_cfg(name)
    overlay = None
    if pretrained:
        overlay = {"file": _timm_weights(name, published, place), "custom_load": False}
    size = {"img_size": size_px} if published is not None and published.fixed_input_size else {}
    try:
        model = timm.create_model(
            name, pretrained=pretrained, num_classes=0, pretrained_cfg_overlay=overlay, **size
        )  # fmt: skip
    except Exception as error:  # each architecture checks sizes its own way
        raise UserError(f"{place} timm:{name}: cannot be built for pictures of {size_px} px ({_why(error)})") from error
    assert isinstance(model, nn.Module)
    return model


def _timm_weights(name: str, published: Any, place: str) -> str:
    """Path of the model's safetensors file in the cache."""
    from huggingface_hub import hf_hub_download

    repository = getattr(published, "hf_hub_id", None)
    if not repository:
        raise UserError(f"{place} timm:{name}: has no published weights; expected pretrained: false, or another model")
    try:
        return cache_then_hub(
            repository,
            lambda cached: hf_hub_download(repository, "model.safetensors", local_files_only=cached),
        )
    except Exception as error:  # hubs and caches raise whatever they like
        raise UserError(_cannot_be_had(f"{place} timm:{name}", True, error)) from error


def transformers_model(location: str, pretrained: bool, place: str) -> Any:
    """The transformers model of a folder or a name: with its weights, or random ones of the same architecture.

    Raises:
        UserError: the folder, the config or the weights cannot be had, or weights are missing from its file.
    """
    allow_torchvision()
    from transformers import AutoConfig, AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one bar a rank, for what takes a second

    where = f"{place} hf:{location}"
    source = str(Path(location).expanduser()) if location.startswith("~") else location
    is_folder = Path(source).is_dir()
    if not is_folder and source.startswith((".", "/")):
        raise UserError(f"{where}: no such folder")

    def load(cached: bool) -> tuple[Any, set[str]]:
        only = {"local_files_only": cached, "trust_remote_code": False}
        if not pretrained:
            config = AutoConfig.from_pretrained(source, **only)
            return AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32), set()
        model, report = AutoModel.from_pretrained(
            source, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **only
        )
        return model, set(report["missing_keys"])

    try:
        model, missing = load(True) if is_folder else cache_then_hub(source, load)
    except Exception as error:  # hubs, caches and parsers raise whatever they like
        raise UserError(_cannot_be_had(where, pretrained, error)) from error
    missing = {key for key in missing if "pooler." not in key}  # heads over the first token, which no tower reads
    if missing:
        raise UserError(
            f"{where}: its weights file lacks {len(missing)} of the parameters of {type(model).__name__}, for example "
            f"{min(missing)}; expected a complete model, or pretrained: false for random weights"
        )
    return model


def _why(error: Exception) -> str:
    return textwrap.shorten(str(error), 200) or type(error).__name__


def _cannot_be_had(encoder: str, pretrained: bool, error: Exception) -> str:
    hub = "in the cache or on the Hugging Face hub"
    if not pretrained:
        return f"{encoder}: its config cannot be had ({_why(error)}); expected a folder with config.json, or one {hub}"
    folder = "" if " timm:" in encoder else "in a folder, "
    return (
        f"{encoder}: its published weights cannot be had ({_why(error)}); expected safetensors {folder}{hub}; or "
        "pretrained: false for random weights"
    )


def _closest(name: str, names: list[str]) -> str:
    clause = nearest(name, names)
    return clause.split("(valid:")[0].strip() or "see timm.list_models()"
