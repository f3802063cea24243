"""A run's towers, taken away: weights, config, tokenizer and model card in one folder (pretrain/export_format.py)."""

from __future__ import annotations

import os
import secrets
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_pipeline.settings import UserError
from data_pipeline.shards import file_sha256, write_json
from pretrain.checkpoint import read_description
from pretrain.config import RunConfig, TowersConfig
from pretrain.data.tokenize import Tokenizer
from pretrain.evaluate import anchor_of, load_run, own_score
from pretrain.export_format import CARD, CONFIG, WEIGHTS, ExportConfig, Origin, is_export
from pretrain.model_card import model_card
from pretrain.towers.build import ModelConfig, Towers

LIBRARIES = ("parallelotope", "torch", "timm", "transformers", "tokenizers")


def export_run(run: Path, out: Path, which: str, force: bool) -> ExportConfig:
    """Export the towers of a run's "best" or "last" checkpoint (or of the checkpoint folder `run`) to `out`.

    Everything is written into a temporary folder beside `out` and renamed: there is a whole export or none.

    Raises:
        UserError: no run or checkpoint, `out` holds something else (or an export, without `force`), or the disk is
            full.
    """
    check_target(out, force)
    config, model, source = load_run(run, which)
    # Beside the resolved folder: `out` may be a link to one on another disk, and a rename stays on one.
    final = out.resolve()
    partial = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        exported = _write(partial, out.name, config, model.evaluated, source)
        _publish_folder(partial, final)
    except (OSError, SafetensorError) as error:
        raise UserError(f"export {out}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return exported


def check_target(out: Path, force: bool) -> None:
    """Refuse to overwrite what is no export, and an export without `force`.

    Raises:
        UserError: names what is there.
    """
    if out.is_dir() and is_export(out):
        if not force:
            raise UserError(f"--out {out}: an export is there; expected another folder, or --force to replace it")
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: a folder that is no export and not empty; expected a new folder")
    elif out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file; expected a new folder")


def _write(folder: Path, name: str, config: RunConfig, towers: Towers, source: Path) -> ExportConfig:
    """All files of the export, flushed to disk."""
    # Cloned: the format refuses tensors that share memory, as tied weights do.
    kept = {key: value for key, value in towers.state_dict().items() if ".independent." not in key}
    weights = {key: _as_fp32(value) for key, value in kept.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    progress = read_description(source)["progress"]
    identity = read_description(source)["identity"]
    run = source.parent.parent
    exported = ExportConfig(
        **ModelConfig.of(config).model_dump(exclude={"towers", "independent"}),
        towers=_portable_towers(folder, config.towers, towers),
        score=own_score(config),
        anchor=anchor_of(config),
        weights_sha256=file_sha256(folder / WEIGHTS),
        origin=Origin(
            run=run.resolve().name, checkpoint=source.name, step=progress["step"], dataset=identity["dataset"],
            seed=config.seed, encoders=_named_encoders(config.towers),
        ),
        libraries={library: version(library) for library in LIBRARIES},
    )  # fmt: skip
    sizes = {key: sum(p.numel() for p in tower.parameters()) for key, tower in towers.towers.items()}
    (folder / CARD).write_text(model_card(name, exported, config, sizes, run), encoding="utf-8")
    write_json(folder / CONFIG, exported.model_dump(mode="json"))
    shutil.copymode(folder / CARD, folder / WEIGHTS)  # safetensors lets only the owner read what it writes
    for path in folder.rglob("*"):
        if path.is_file():
            _flush(path)
    return exported


def _as_fp32(value: torch.Tensor) -> torch.Tensor:
    value = value.detach().to("cpu", copy=True).contiguous()
    return value.float() if value.is_floating_point() else value


def _portable_towers(folder: Path, config: TowersConfig, towers: Towers) -> TowersConfig:
    """The towers' config with every name from a hub or a folder replaced by files that are written beside it."""
    changed: dict[str, Any] = {}
    for name in config.names:
        own = getattr(config, name)
        update: dict[str, Any] = {"pretrained": False}
        if isinstance(own.encoder, str) and own.encoder.startswith("hf:"):
            encoder: Any = towers.towers[name].encoder
            encoder.encoder.config.save_pretrained(folder / "encoders" / name)
            update["encoder"] = f"hf:encoders/{name}"
        if name == "text":
            update["tokenizer"] = Tokenizer(own.tokenizer, own.max_tokens).save(folder)
        changed[name] = own.model_copy(update=update)
    return config.model_copy(update=changed)


def _named_encoders(config: TowersConfig) -> dict[str, str]:
    encoders = {name: getattr(config, name).encoder for name in config.names}
    return {name: encoder for name, encoder in encoders.items() if isinstance(encoder, str)}


def _publish_folder(partial: Path, final: Path) -> None:
    """Rename `partial` to `final`; an older export is set aside first and deleted last."""
    if not final.exists():
        os.replace(partial, final)
    else:
        old = final.with_name(f".{final.name}.{secrets.token_hex(4)}.old.partial")
        os.replace(final, old)
        os.replace(partial, final)
        shutil.rmtree(old)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
