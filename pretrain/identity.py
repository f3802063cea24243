"""What the state of a run belongs to, and the refusal of state that belongs to something else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.settings import UserError
from pretrain.config import RunConfig
from pretrain.data.tokenize import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a state belongs to; a run continues a checkpoint only where all of it is equal."""

    towers: dict[str, Any]
    embedding_dim: int
    objective: list[dict[str, Any]]
    optimizer: str
    tokenizer: str | None  # digest; None: no text
    dataset: str  # digest of the pinned training splits
    mixture: list[float]  # weights of several datasets; empty: in proportion to their samples
    global_batch: int
    seed: int
    block_shards: int

    @classmethod
    def of(cls, config: RunConfig, dataset_digest: str) -> Identity:
        """The identity of a run of `config` on a training split with this digest."""
        return cls(
            towers=config.towers.model_dump(mode="json"),
            embedding_dim=config.embedding_dim,
            objective=[part.model_dump(mode="json", exclude={"tile", "kernel"}) for part in config.objective],
            optimizer=config.optimizer.name,
            tokenizer=tokenizer_digest(config),
            dataset=dataset_digest,
            mixture=[p.weight for p in config.data.train if p.weight is not None and len(config.data.train) > 1],
            global_batch=config.train.global_batch,
            seed=config.seed,
            block_shards=config.data.block_shards,
        )


def tokenizer_digest(config: RunConfig) -> str | None:
    """What the ids of a run's texts mean here and now."""
    text = config.towers.text
    return None if text is None else Tokenizer(text.tokenizer, text.max_tokens).digest


def check_tokenizer(checkpoint: Path, found: dict[str, Any], config: RunConfig) -> None:
    """Refuse weights whose token ids mean other words here; `found` is the identity in the checkpoint's description.

    Raises:
        UserError: another tokenizer, by its name or by what the name stands for.
    """
    there, here, text = found.get("tokenizer"), tokenizer_digest(config), config.towers.text
    if text is None or there in (None, here):
        return
    name = found["towers"]["text"]["tokenizer"]
    if name != text.tokenizer:
        raise UserError(
            f"checkpoint {checkpoint} was trained with the tokenizer '{name}', found '{text.tokenizer}' here; expected "
            f"towers.text.tokenizer: {name}"
        )
    raise UserError(
        f"checkpoint {checkpoint} was trained with another tokenizer: '{name}' was {there} then and is {here} here; "
        "use the version of parallelotope and of the tokenizer that trained it"
    )


def check_identity(checkpoint: Path, found: dict[str, Any], wanted: Identity, accept: Sequence[str] = ()) -> list[str]:
    """Refuse a checkpoint of another model, objective, dataset or order; `found` is what its description says.

    accept: fields in which it may differ. Returns a line for each such difference.

    Raises:
        UserError: names each other difference, what was found and what this run has.
    """
    refused: dict[str, list[str]] = {}
    accepted = []
    for field, here in asdict(wanted).items():
        lines = differences(field, found.get(field), here)
        if lines and field in accept:
            accepted += [f"accepted: {line}" for line in lines]
        elif lines:
            refused[field] = lines
    if refused:
        lines = [line for lines in refused.values() for line in lines]
        options = " ".join(f"--accept {field}" for field in refused)
        raise UserError(
            f"checkpoint {checkpoint} belongs to another run: {'; '.join(lines)}; "
            f"use another run_dir, init_from to start from its weights, or go on with {options}"
        )
    return accepted


def differences(place: str, found: Any, wanted: Any) -> list[str]:
    """ "a.b is 1 there, 2 here" for each key that differs between two nested mappings."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(set(found) | set(wanted))
        return [d for key in keys for d in differences(f"{place}.{key}".lstrip("."), found.get(key), wanted.get(key))]
    return [] if found == wanted else [f"{place} is {found!r} there, {wanted!r} here"]
