"""The README.md of an exported model: what it is, what it was made from, how good it was found, how to use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.shards import dataset_name
from pretrain.config import RunConfig, TransformerConfig
from pretrain.data.pins import pins_digest, read_pins
from pretrain.export_format import ExportConfig
from pretrain.scoring.names import SCORE_LABELS, SIGN_BLIND

FILE_NAMES = {"video": '["a.mp4", "b.mp4"]', "audio": '["a.mp4", "b.mp4"]', "text": '["a dog barks", "rain on a roof"]'}


def model_card(name: str, exported: ExportConfig, config: RunConfig, sizes: dict[str, int], run: Path) -> str:
    """Markdown. name: of the export; sizes: parameters of each tower; run: the folder with its evaluations."""
    sections = [
        "\n".join(_front(name, exported, sizes)),
        "## Use\n\n" + _usage(exported),
        "## Training\n\n" + "\n".join(_training(exported, config, run)),
        "## Retrieval\n\n" + _evaluations(run, exported.origin.checkpoint),
        "## Limits\n\n" + "\n".join(_limits(exported)),
    ]
    return "\n\n".join(sections) + "\n"


def _front(name: str, exported: ExportConfig, sizes: dict[str, int]) -> Iterator[str]:
    modalities = ", ".join(exported.modalities)
    yield f"# {name}"
    yield ""
    yield (
        f"Encoders of {modalities} into one space of {exported.embedding_dim} dimensions, trained with Parallelotope "
        f"(run `{exported.origin.run}`, {exported.origin.checkpoint}). Tuples are scored by "
        f"**{SCORE_LABELS[exported.score]}**."
    )
    yield ""
    yield "| tower | encoder | parameters | sees |"
    yield "|---|---|---|---|"
    for modality in exported.modalities:
        yield f"| {modality} | {_encoder(exported, modality)} | {sizes[modality]:,} | {_sees(exported, modality)} |"


def _encoder(exported: ExportConfig, modality: str) -> str:
    own = getattr(exported.towers, modality)
    if isinstance(own.encoder, TransformerConfig):
        shape = own.encoder
        return f"transformer, width {shape.width}, depth {shape.depth}, {shape.num_heads} heads"
    return f"`{exported.origin.encoders[modality]}`" + (", frozen" if own.freeze else "")


def _sees(exported: ExportConfig, modality: str) -> str:
    video, audio, text = exported.towers.video, exported.towers.audio, exported.towers.text
    if modality == "video" and video is not None:
        return f"{video.num_frames} frames over {exported.window_s:g} s, {video.size_px} px square"
    if modality == "audio" and audio is not None:
        return f"{exported.window_s:g} s mono at {audio.sample_rate_hz} Hz, {audio.num_mels} mel bands"
    assert text is not None
    return f"up to {text.max_tokens} tokens"


def _usage(exported: ExportConfig) -> str:
    query = exported.anchor
    others = [name for name in exported.modalities if name != query]
    arguments = ", ".join(f"{name}={FILE_NAMES[name]}" for name in others)
    return f"""    from pretrain.inference import load_model

    model = load_model("DIR")  # this folder
    candidates = model.encode({arguments})
    queries = model.encode({query}={FILE_NAMES[query]})
    print(model.similarity(queries, candidates))  # [2, 2], higher is better

This needs parallelotope without its `train` extra, and no network. A whole sharded dataset:
`parallelotope embed DIR --data DATASET --out EMBEDDINGS`."""


def _training(exported: ExportConfig, config: RunConfig, run: Path) -> Iterator[str]:
    train = config.train
    yield f"- data: {_counts(exported, run)}"
    yield f"- step {exported.origin.step:,} of {config.schedule.num_steps:,}, global batch {train.global_batch:,}"
    for part in config.objective:
        options = ", ".join(
            f"{key} {value}" for key, value in part.model_dump(mode="json", exclude={"name", "tile"}).items()
        )
        yield f"- objective `{part.name}`: {options}"
    optimizer, schedule = config.optimizer, config.schedule
    yield (
        f"- AdamW: lr {optimizer.lr:g}, betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g}, weight decay "
        f"{optimizer.weight_decay:g}, gradient norm clipped at {train.grad_clip:g}; {schedule.warmup_steps} steps of "
        f"warmup, then a cosine to {schedule.final_lr_ratio:g} of the peak"
    )
    augment = config.data.augment
    yield (
        f"- {train.precision}, loss in {train.loss_precision}, seed {config.seed}; augmentation: crop of "
        f"{augment.crop_scale[0]:g} to {augment.crop_scale[1]:g} of the picture, brightness {augment.brightness:g}, "
        f"gain {augment.gain_db:g} dB{', flip' if augment.flip else ''}"
    )
    yield "- made with " + ", ".join(f"{library} {number}" for library, number in exported.libraries.items())


def _counts(exported: ExportConfig, run: Path) -> str:
    """Samples of each dataset, of the shards that the run has pinned."""
    pins, digest = read_pins(run), exported.origin.dataset
    if pins is None or pins_digest(pins) != digest:
        return f"digest {digest} (the run keeps no list of its shards)"
    parts = [
        f"{pin.num_samples:,} samples of split {pin.split}"
        + (f" of `{dataset_name(pin.path)}`" if len(pins) > 1 else "")
        for pin in pins
    ]
    return f"{', '.join(parts)} (digest {digest})"


def _evaluations(run: Path, checkpoint: str) -> str:
    tables = []
    for path in sorted(run.glob("evaluation-*.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            tables.append("\n".join(_evaluation(report, checkpoint)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            tables.append(f"{path.name} could not be read: {type(error).__name__} {error}")
    return "\n\n".join(tables) or "Not measured: `parallelotope evaluate` was not run before the export."


def _evaluation(report: dict[str, Any], checkpoint: str) -> Iterator[str]:
    measured = report["checkpoint"]
    other = "" if measured == checkpoint else f", **measured on {measured}, not on what is exported**"
    yield f"Split {report['split']}, {report['num_samples']:,} samples{other}. Recall in percent."
    yield ""
    yield "| query | candidates | score | R@1 | 95 % | R@5 | R@10 | median rank | chance R@1 | queries | of |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for row in report["metrics"]:
        recalls = [_percent(row[f"recall_at_{k}"]) for k in (1, 5, 10)]
        interval = f"{_percent(row['recall_at_1_low'])}-{_percent(row['recall_at_1_high'])}"
        yield (
            f"| {row['query']} | {row['candidates']} | {SCORE_LABELS.get(row['score'], row['score'])} | {recalls[0]} | "
            f"{interval} | {recalls[1]} | {recalls[2]} | {_number(row['median_rank'])} | "
            f"{_percent(row['chance_recall_at_1'])} | {row['num_queries']:,} | {row['num_candidates']:,} |"
        )
    for warning in report.get("warnings", ()):
        yield f"\nWarning: {warning}."


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _limits(exported: ExportConfig) -> Iterator[str]:
    yield (
        f"- Of a longer clip only the {exported.window_s:g} s in its middle are encoded; cut long recordings into "
        "clips (`parallelotope shard`)."
    )
    if exported.towers.text is not None:
        yield f"- Texts are cut after {exported.towers.text.max_tokens} tokens."
    if exported.score in SIGN_BLIND:
        yield (
            f"- The {SCORE_LABELS[exported.score]} does not see signs: an embedding and its opposite score alike. "
            'Compare with `score="summed_cosine"` where that matters.'
        )
    yield "- Embeddings carry what the training data carries, its errors and biases included."
