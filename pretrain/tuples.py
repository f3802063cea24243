"""Rows against tuples of the other modalities, which pairs of samples cannot say: what Symile's contrast needs.

Each rank scores its own rows against tuples put together from the embeddings of all ranks; there is no direction over
columns. Scores of a tile are made again for the backward pass, so memory grows with rows + tuples, not with their
product; the number of tuples is the objective's to bound.
"""

from __future__ import annotations

import math
import zlib
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from data_pipeline.settings import UserError
from pretrain.collectives import World
from pretrain.objectives.terms import TupleCrossEntropy
from pretrain.side_statistics import SOFTPLUS_LINEAR_FROM


def tuple_cross_entropy(term: TupleCrossEntropy, world: World) -> tuple[Tensor, Tensor]:
    """This rank's share of the term, and how many samples of the global batch take part.

    Raises:
        UserError: more tuples than `max_tuples`.
    """
    valid, ids = world.gather_rows(term.valid), world.gather_rows(term.ids)
    there = {name: world.gather_rows(mask) for name, mask in term.there.items()}
    known = [name for name, mask in there.items() if mask.any()]
    count = valid.sum().to(term.row.dtype)
    if not known or count == 0:
        return (term.row * 0).sum(), count * 0
    others = {name: world.gather_rows(term.others[name]) for name in known}
    scale = term.scale * term.fill ** (len(there) - len(known))
    own = scale * _own_products(term, known)
    members = _candidates(term, {name: there[name] for name in known}, ids)
    items = _items(ids)
    mine = items[world.rank * len(term.row) : (world.rank + 1) * len(term.row)]
    parts = []
    vectors = [others[name] for name in known]
    splits = (rows.split(term.tile) for rows in (term.row, mine, own))
    for own_rows, own_items, own_scores in zip(*splits, strict=True):  # views: one copy for all tiles of tuples
        of_tiles = [
            checkpoint(_log_sum_exp, own_rows, vectors, chosen, own_items, items, scale, use_reentrant=False)
            for chosen in members.split(term.tile)
        ]
        lse = torch.stack(of_tiles).logsumexp(dim=0)
        parts.append(softplus(lse - own_scores, threshold=SOFTPLUS_LINEAR_FROM))
    values = torch.cat(parts)
    return torch.where(term.valid, values, torch.zeros_like(values)).sum() / count, count


def _own_products(term: TupleCrossEntropy, known: list[str]) -> Tensor:
    """[n]: sum over dimensions of the product of all that a sample has."""
    factors = [
        torch.where(term.there[name][:, None], term.others[name], torch.full_like(term.row, term.fill))
        for name in known
    ]
    return reduce(torch.mul, factors, term.row).sum(dim=1)


def _log_sum_exp(
    rows: Tensor, others: list[Tensor], chosen: Tensor, mine: Tensor, items: Tensor, scale: Tensor
) -> Tensor:
    """[r]: over the tuples `chosen` [t, modalities], those all of the row's own item left out."""
    product = reduce(torch.mul, [vectors[chosen[:, m]] for m, vectors in enumerate(others)])
    scores = rows @ product.T * scale
    own_item = (items[chosen][None] == mine[:, None, None]).all(dim=2)
    return scores.masked_fill(own_item, -torch.inf).logsumexp(dim=1)


def _candidates(term: TupleCrossEntropy, there: dict[str, Tensor], ids: Tensor) -> Tensor:
    """[tuples, modalities]: samples of the global batch by their index."""
    places = {name: mask.nonzero().flatten() for name, mask in there.items()}
    if term.candidates == "shuffled":
        keys = _mixed(_keys(ids))
        taking_part = torch.stack(list(there.values())).any(dim=0)
        batch = torch.where(taking_part, keys, torch.zeros_like(keys)).sum()  # the same in any order of the samples
        length = min(len(place) for place in places.values())
        ordered = [place[_order(keys[place], batch, name)][:length] for name, place in places.items()]
        return torch.stack(ordered, dim=1)
    num_tuples = math.prod(len(place) for place in places.values())
    if num_tuples > term.max_tuples:
        raise UserError(
            f"objective {term.name}: {num_tuples:,} tuples of the other modalities in a global batch; expected at most "
            f"max_tuples = {term.max_tuples:,}: use candidates: shuffled, or a smaller train.global_batch"
        )
    return torch.cartesian_prod(*places.values()).view(num_tuples, len(places))


def _order(keys: Tensor, batch: Tensor, name: str) -> Tensor:
    """A permutation by the samples' keys, that of their batch and the name of a modality: the same samples meet in one
    batch, others in the next."""
    return _mixed(keys ^ _mixed(batch ^ zlib.crc32(name.encode()))).argsort(stable=True)


def _keys(ids: Tensor) -> Tensor:
    """The ids; the places where there are none."""
    return torch.where(ids == -1, torch.arange(len(ids), device=ids.device), ids)


def _mixed(keys: Tensor) -> Tensor:
    """Every bit of an int64 spread over all of it; products wrap around."""
    for factor in (-0x61C8864680B583EB, -0x4B47D0C5A1B3A9C3):  # odd constants
        keys = (keys ^ (keys >> 29)) * factor
    return keys ^ (keys >> 32)


def _items(ids: Tensor) -> Tensor:
    """Numbers of items: samples with one id are one, -1 is different from everything."""
    return torch.where(ids == -1, -2 - torch.arange(len(ids), device=ids.device), ids)
