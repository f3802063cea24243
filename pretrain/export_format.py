"""The format of an exported model: a folder that loads without a network, a cache or the run that made it.

config.json            what the towers are, how tuples are scored, where the model came from
model.safetensors      fp32 weights of the towers, under the names of `pretrain.towers.build.Towers`
tokenizer.json         or tokenizer/, the files of a published tokenizer
encoders/MODALITY/     config.json of encoders that were given as hf:NAME
README.md              the model card
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from data_pipeline.settings import Settings, UserError, check_settings
from data_pipeline.shards import file_sha256
from pretrain.config import TowersConfig
from pretrain.scoring.names import ScoreName
from pretrain.towers.build import ModelConfig

FORMAT: Literal["parallelotope-export"] = "parallelotope-export"
FORMAT_VERSION: Literal[2] = 2
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


class Origin(Settings):
    """Which run, and which state of it, an export was made of."""

    run: str  # name of its folder
    checkpoint: str
    step: int
    dataset: str  # digest of the training split
    seed: int
    encoders: dict[str, str]  # modality -> the published encoder the run named, where it named one


class ExportConfig(ModelConfig):
    """config.json of an export."""

    format: Literal["parallelotope-export"] = FORMAT
    format_version: Literal[2] = FORMAT_VERSION
    score: ScoreName  # how the run itself scored a tuple
    anchor: str  # the modality whose queries its objective scored
    weights_sha256: str
    origin: Origin
    libraries: dict[str, str]  # versions that made it

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that have a tower."""
        return self.towers.names


def is_export(folder: Path) -> bool:
    """Whether `folder` holds an export of any version."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def read_export_config(folder: Path) -> ExportConfig:
    """The config of an export, its places inside the folder resolved.

    Raises:
        UserError: no export there, one of another version, or a config that does not fit.
    """
    if not folder.is_dir():
        raise UserError(f"export {folder}: no such folder; expected the output of 'parallelotope export'")
    if not is_export(folder):
        hint = f"; this is a run: 'parallelotope export {folder} --out DIR'" if _is_run(folder) else ""
        raise UserError(f"export {folder}: no {CONFIG} of an export in it{hint}")
    values: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"export {folder}: format version {version} found, {FORMAT_VERSION} expected: export it again")
    config = check_settings(ExportConfig, values, str(folder / CONFIG))
    return config.model_copy(update={"towers": _resolved(config.towers, folder)})


def check_weights(folder: Path, config: ExportConfig) -> None:
    """Refuse weights that are not those the config was written for.

    Raises:
        UserError: missing, or another checksum.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"export {folder}: {WEIGHTS} is missing: copy the whole folder again")
    if file_sha256(path) != config.weights_sha256:
        raise UserError(f"export {path}: its checksum is not the one in {CONFIG}: copy the whole folder again")


def export_digest(folder: Path) -> str:
    """A short hash of config.json, which holds that of the weights: equal digests, equal models."""
    return hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()[:16]


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _resolved(towers: TowersConfig, folder: Path) -> TowersConfig:
    """Names relative to the export become paths, and no published weights are asked for."""
    home = folder.resolve()
    changed = {}
    for name in towers.names:
        own = getattr(towers, name)
        update: dict[str, Any] = {"pretrained": False}
        if isinstance(own.encoder, str) and own.encoder.startswith("hf:"):
            update["encoder"] = f"hf:{home / own.encoder.removeprefix('hf:')}"
        if name == "text":
            source, _, place = own.tokenizer.partition(":")
            update["tokenizer"] = f"{source}:{home / place}"
        changed[name] = own.model_copy(update=update)
    return towers.model_copy(update=changed)
