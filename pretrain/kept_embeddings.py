"""The embeddings of a split, kept beside the figures made from them, and where the samples themselves are.

RUN/embeddings/validation.safetensors          of the newest validation
RUN/embeddings/evaluation-SPLIT.safetensors    of `parallelotope evaluate`
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Bool, Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.settings import UserError
from data_pipeline.shards import ShardedDataset, partial_path, publish

FORMAT = "parallelotope-embeddings-1"


@dataclass(frozen=True, kw_only=True)
class KeptEmbeddings:
    """n samples of one split at one step.

    vectors, present: by modality. positions: of the samples in `ShardedDataset(data, split)`, whose digest is `digest`.
    """

    vectors: dict[str, Float[Tensor, "samples dim"]]
    present: dict[str, Bool[Tensor, " samples"]]
    positions: Int64[Tensor, " samples"]
    data: str  # absolute path of the dataset folder, or its URL
    split: str | None
    digest: str
    step: int

    @classmethod
    def of(
        cls,
        dataset: ShardedDataset,
        step: int,
        vectors: dict[str, Tensor],
        present: dict[str, Tensor],
        positions: Tensor,
    ) -> KeptEmbeddings:
        """Embeddings of samples of `dataset` after `step` updates."""
        return cls(
            vectors=vectors, present=present, positions=positions, data=dataset.absolute_location,
            split=dataset.split, digest=dataset.digest, step=step,
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Write a safetensors file under its name, whole or not at all.

        Raises:
            OSError, SafetensorError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        source = {"data": self.data, "split": self.split, "digest": self.digest, "step": self.step}
        metadata = {"format": FORMAT, "source": json.dumps(source), "modalities": json.dumps(list(self.vectors))}
        tensors = {f"vectors/{name}": rows.contiguous() for name, rows in self.vectors.items()}
        tensors |= {f"present/{name}": mask.contiguous() for name, mask in self.present.items()}
        partial = partial_path(path)
        try:
            save_file(tensors | {"positions": self.positions}, partial, metadata)
            publish(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> KeptEmbeddings:
        """What `save` wrote.

        Raises:
            UserError: there is no such file, or it is something else.
        """
        try:
            with safe_open(path, framework="pt") as stream:
                metadata = stream.metadata() or {}
                source, modalities = json.loads(metadata["source"]), json.loads(metadata["modalities"])
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a mapping
            return cls(
                vectors={name: tensors[f"vectors/{name}"] for name in modalities},
                present={name: tensors[f"present/{name}"] for name in modalities},
                positions=tensors["positions"],
                **source,
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"embeddings {path}: not kept embeddings of a run ({error})") from error


def embeddings_path(run: Path, name: str) -> Path:
    """Where a run keeps the embeddings called `name`: validation, or evaluation-SPLIT."""
    return run / "embeddings" / f"{name}.safetensors"
