"""Hard negatives: what a model confuses each sample with."""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.settings import UserError
from pretrain.collectives import ALONE, World
from pretrain.objectives.embeddings import Embeddings
from pretrain.scoring.comparison import TILE, Comparison
from pretrain.scoring.search import Matches, best
from pretrain.scoring.side import part_of


@torch.no_grad()
def hardest_negatives(
    embeddings: Embeddings,
    *,
    query: str,
    candidates: str | None = None,
    score: str,
    top_k: int = 1,
    world: World = ALONE,
    dtype: torch.dtype = torch.float64,
    tile: int = TILE,
) -> Matches:
    """For each local sample the `top_k` samples of all ranks that score highest with it and are not its own item.

    Without gradient. Matches.indices are rows of the global batch (of `embeddings` itself in one process), -1 where a
    sample has fewer negatives, or none of the modalities of `query`. A sample's own item is itself and every sample
    with the same id (-1 differs from everything). A collective call.

    Args:
        embeddings: of the local samples, equally many on each rank.
        query, candidates: a modality, or several ("video+audio"); candidates None: all but those of `query`.
        score: see `names`. top_k, dtype, tile: as of `search`.

    Raises:
        UserError: a side names no modality of `embeddings`; else see `search`.
    """
    if candidates is None:
        candidates = "+".join(name for name in embeddings.vectors if name not in query.split("+"))
        if not candidates:
            raise UserError(f"query '{query}' is every modality: say which the candidates are")
    local, others = part_of(embeddings, query), _gathered(part_of(embeddings, candidates), world)
    ids, all_ids = embeddings.sample_ids(), world.gather_rows(embeddings.sample_ids())
    first = world.rank * embeddings.num_samples
    places = torch.arange(len(all_ids), device=ids.device)
    own = places[first : first + len(ids)]

    def same_item(rows: slice, columns: slice) -> Tensor:
        same_id = (ids[rows, None] == all_ids[columns]) & (ids[rows, None] != -1)
        return same_id | (own[rows, None] == places[columns])

    comparison = Comparison.of(local, others, score, dtype=dtype, device=ids.device, tile=tile)
    return best(comparison, top_k, same_item, ids.device)


def _gathered(local: Embeddings, world: World) -> Embeddings:
    present = local.present
    return Embeddings(
        vectors={name: world.gather_rows(rows.detach()) for name, rows in local.vectors.items()},
        present=None if present is None else {name: world.gather_rows(mask) for name, mask in present.items()},
    )
