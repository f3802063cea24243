"""Embed a split and measure retrieval on it: during training over all ranks, afterwards in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.settings import load_settings
from data_pipeline.shards import ShardCache, ShardedDataset, shards_of
from pretrain import checkpoint
from pretrain.collectives import ALONE, World
from pretrain.config import RunConfig
from pretrain.data.loader import EvalLoader
from pretrain.engine import Engine
from pretrain.grad_cache import no_stage
from pretrain.identity import check_tokenizer
from pretrain.kept_embeddings import KeptEmbeddings
from pretrain.model import PretrainModel
from pretrain.preflight import run_folder
from pretrain.resume import load_model
from pretrain.retrieval import JOINT_SCORES, evaluate_retrieval
from pretrain.retrieval_report import RetrievalMetrics, RetrievalReport
from pretrain.scoring import names as score_names
from pretrain.stored_tensors import StoredTensors
from pretrain.towers.build import ModelConfig, example_inputs

Forward = Callable[[dict[str, dict[str, Tensor]], dict[str, Tensor]], dict[str, Tensor]]


@torch.no_grad()
def embed_split(
    forward: Forward, loader: EvalLoader, config: RunConfig, world: World = ALONE
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Embeddings {modality: [n, D]}, presence {modality: bool [n]} and positions int64 [n] of all samples of all ranks,
    on the CPU.

    Every rank calls `forward` equally often, and agrees with the others on nothing in between: a sharded model gathers
    its weights in every call. A rank that has fewer batches drops what the further calls return.
    """
    names = config.towers.names
    num_calls = int(world.max(torch.tensor([loader.num_batches], device=world.device)).item())
    vectors: dict[str, list[Tensor]] = {name: [] for name in names}
    present: dict[str, list[Tensor]] = {name: [] for name in names}
    positions: list[Tensor] = []
    for batch in loader:
        inputs, masks = batch.chunk(0, batch.num_samples, world.device)
        found = forward(inputs, masks)
        positions.append(batch.ids.to(world.device))
        for name in names:
            vectors[name].append(found[name].float())
            present[name].append(masks[name])
    model = ModelConfig.of(config)
    nobody = {name: torch.zeros(1, dtype=torch.bool, device=world.device) for name in names}
    for _ in range(num_calls - loader.num_batches):
        examples = {name: example_inputs(name, model) for name in names}
        forward({n: {k: t.to(world.device) for k, t in parts.items()} for n, parts in examples.items()}, nobody)
    empty = torch.zeros(0, config.embedding_dim, device=world.device)
    nothing = torch.zeros(0, dtype=torch.bool, device=world.device)
    return (
        {name: _gather_ragged(torch.cat([empty, *parts]), world).cpu() for name, parts in vectors.items()},
        {name: _gather_ragged(torch.cat([nothing, *parts]), world).cpu() for name, parts in present.items()},
        _gather_ragged(torch.cat([nothing.long(), *positions]), world).cpu(),
    )


def _gather_ragged(local: Tensor, world: World) -> Tensor:
    """Rows of all ranks in rank order, where ranks may hold different numbers of them."""
    sizes = world.gather_rows(torch.tensor([len(local)], device=local.device)).tolist()
    longest = max(sizes)
    padded = torch.cat([local, local.new_zeros(longest - len(local), *local.shape[1:])])
    blocks = world.gather_rows(padded).split(longest) if longest else [local]
    return torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=False)])


def anchor_of(config: RunConfig) -> str:
    """The modality whose queries are scored first: the objective's anchor, else text, else the first tower."""
    anchors = [anchor for part in config.objective if (anchor := getattr(part, "anchor", None)) is not None]
    names = config.towers.names
    return anchors[0] if anchors and anchors[0] in names else "text" if "text" in names else names[0]


def own_score(config: RunConfig) -> score_names.ScoreName:
    """How the run itself scores a tuple."""
    return score_names.own_score(part.name for part in config.objective)


def joint_scores(config: RunConfig) -> tuple[str, ...]:
    """The scores by which a run is evaluated: those of every run, and its own."""
    return tuple(dict.fromkeys([*JOINT_SCORES, own_score(config)]))


def validation_score(
    engine: Engine, dataset: ShardedDataset, config: RunConfig, world: World, step: int
) -> tuple[dict[str, Any], RetrievalMetrics, KeptEmbeddings]:
    """Report as JSON, retrieval of anchor -> all other modalities by the run's own score, and the embeddings
    after `step`.

    A collective call.
    """
    loader = EvalLoader(
        dataset, config.data, config.towers, batch_size=config.train.chunk, rank=world.rank, world=world.size,
        max_samples=config.validation.max_samples,
    )  # fmt: skip
    engine.train(False)
    try:
        embedded = embed_split(
            lambda inputs, masks: engine(inputs, masks, around=no_stage, evaluated=True)[0], loader, config, world
        )
    finally:
        engine.train(True)
        loader.close()
    kept = KeptEmbeddings.of(dataset, step, *embedded)
    report = evaluate_retrieval(kept.vectors, kept.present, anchor_of(config), joint_scores(config))
    return report.to_json(), headline(report, config), kept


def headline(report: RetrievalReport, config: RunConfig) -> RetrievalMetrics:
    """Retrieval of anchor -> all others together, by the run's own score."""
    anchor = anchor_of(config)
    others = [name for name in config.towers.names if name != anchor]
    return report.find(anchor, others, own_score(config))


def load_run(run: Path, which: str = "best") -> tuple[RunConfig, PretrainModel, Path]:
    """Config and model of a run, weights from its "best" or "last" checkpoint (or a checkpoint folder inside it).

    Raises:
        UserError: no run or no whole checkpoint there.
    """
    config = load_settings(RunConfig, run_folder(run, which) / "config.yaml")
    source = checkpoint.locate(run, which)
    towers = config.towers.model_copy(
        update={
            name: getattr(config.towers, name).model_copy(update={"pretrained": False}) for name in config.towers.names
        }
    )
    check_tokenizer(source, checkpoint.read_description(source)["identity"], config)
    model = PretrainModel(config.model_copy(update={"towers": towers}))  # its weights come from the checkpoint
    load_model(model, StoredTensors(source))
    return config, model.eval(), source


def evaluate_run(
    run: Path, data: str, split: str, which: str, num_workers: int
) -> tuple[RetrievalReport, Path, KeptEmbeddings]:
    """Retrieval report of a run on a split of a dataset, the checkpoint that was used, and the embeddings."""
    shards = shards_of(data, split)  # a mistake is said before the model is loaded
    config, model, source = load_run(run, which)
    cache = ShardCache.of(config.data.cache_dir, config.data.cache_gib)
    dataset = ShardedDataset(data, split, shards=shards, cache=cache)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    data_config = config.data.model_copy(update={"num_workers": num_workers})
    loader = EvalLoader(dataset, data_config, config.towers, batch_size=config.train.chunk, rank=0, world=1)
    try:
        embedded = embed_split(
            lambda inputs, masks: model(inputs, masks, around=no_stage, evaluated=True)[0],
            loader,
            config,
            World(device=device),
        )
    finally:
        loader.close()
    step = int(checkpoint.read_description(source)["progress"]["step"])
    kept = KeptEmbeddings.of(dataset, step, *embedded)
    report = evaluate_retrieval(kept.vectors, kept.present, anchor_of(config), joint_scores(config))
    return report, source, kept
