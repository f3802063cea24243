"""The upper part of a report: what the runs are, how they went, where their time went."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.config import TrainSplit
from pretrain.evaluate import anchor_of, own_score
from pretrain.report import figures
from pretrain.report.history import Curve, RunHistory
from pretrain.scoring.names import SCORE_LABELS

NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A figure with its heading; figure: plotly JSON. value: the newest figure in words."""

    title: str
    figure: str
    value: str = ""
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Card:
    """A headline figure."""

    title: str
    value: str
    note: str


def percent(share: float) -> str:
    """A share in [0, 1] in per cent."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Seconds in words: 8 min 20 s."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60) if seconds >= 3600 else int(seconds // 60)
    if seconds < 3600:
        return f"{minutes} min {seconds % 60:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min"


def large(number: int) -> str:
    """A count in words: 2.6 M."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def headline_row(run: RunHistory, metrics: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of anchor -> all others by the run's own score."""
    anchor, score = anchor_of(run.config), own_score(run.config)
    others = {name for name in run.config.towers.names if name != anchor}
    for row in metrics:
        if row["query"] == anchor and set(row["candidates"].split("+")) == others and row["score"] == score:
            return row
    return None


def queries(row: dict[str, Any]) -> str:
    """How many queries a row's figures are of, in words."""
    return "1 query" if row["num_queries"] == 1 else f"{row['num_queries']:,} queries"


def cards(run: RunHistory) -> list[Card]:
    """The figures that a reader wants first."""
    found = []
    for evaluated in run.sets:
        row = headline_row(run, evaluated.result["metrics"])
        if row is not None:
            note = (
                f"R@1 {row['query']} → {row['candidates']} by {SCORE_LABELS.get(row['score'], row['score'])}; "
                f"95 %: {100 * row['recall_at_1_low']:.1f} to {100 * row['recall_at_1_high']:.1f}; "
                f"chance {100 * row['chance_recall_at_1']:.2g} %; {queries(row)}"
            )
            found.append(Card(title=evaluated.name, value=percent(row["recall_at_1"]), note=note))
    found = found[:3]
    loss = run.curves.get("loss")
    if loss is not None:
        found.append(Card(title="loss", value=f"{loss.values[-1]:.3f}", note=f"{loss.values[0]:.2f} at the first step"))
    speed = run.curves.get("samples_per_s")
    if speed is not None:
        note = f"median over steps; global batch {run.config.train.global_batch}"
        value = f"{statistics.median(speed.values):.3g}"
        found.append(Card(title="samples / s", value=value, note=note))
    return found


def facts(run: RunHistory) -> list[tuple[str, str]]:
    """Name and value of what a reader must know of a run."""
    config, known = run.config, run.facts
    train, validation = config.data.train, config.data.validation
    num_steps = config.schedule.num_steps
    rows = [
        ("steps", f"{run.step:,} of {num_steps:,}"),
        ("time in steps", duration(sum(run.stage_s.values(), start=0.0))),
        ("objective", " + ".join(_objective(part) for part in config.objective)),
        ("training data", _train_data(train, known.num_train_samples if known else None)),
    ]
    if validation is not None:
        count = known.num_validation_samples if known else None
        rows.append(("validation data", _data(validation.path, validation.split, count)))
    batch = f"{config.train.global_batch} samples, in chunks of {config.train.chunk}"
    if known is not None:
        ranks = "1 rank" if known.num_ranks == 1 else f"{known.num_ranks} ranks"
        rows.append(("ranks", f"{ranks}, {known.device}"))
        rows.append(
            ("parameters", f"{large(sum(known.parameters.values()))}: {_parts(config.towers.names, known.parameters)}")
        )
    return [
        *rows,
        ("global batch", batch),
        ("ZeRO stage, precision", f"{config.train.zero_stage}, {config.train.precision}"),
        ("learning rate", f"{config.optimizer.lr:g}, {config.schedule.warmup_steps} steps of warmup"),
        ("embedding", f"{config.embedding_dim} dimensions"),
        ("seed", str(config.seed)),
    ]


def _objective(part: Any) -> str:
    return part.name if part.weight == 1 else f"{part.weight:g} {part.name}"


def _parts(towers: Sequence[str], parameters: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {large(parameters[name])}" for name in towers if name in parameters)


def _train_data(parts: Sequence[TrainSplit], count: int | None) -> str:
    weighted = [f"{p.path}, {p.split}" + ("" if p.weight is None else f" (weight {p.weight:g})") for p in parts]
    return "; ".join(weighted) + ("" if count is None else f": {count:,} samples")


def _data(path: str, split: str, count: int | None) -> str:
    return f"{path}, {split}" + ("" if count is None else f": {count:,} samples")


def warnings_of(run: RunHistory) -> list[str]:
    """Each warning of the run's sets once, and where else the same is said with other numbers."""
    found: dict[str, list[tuple[str, str]]] = {}
    for evaluated in run.sets:
        for warning in evaluated.result.get("warnings", []):
            found.setdefault(NUMBER.sub("#", warning), []).append((evaluated.name, warning))
    lines = []
    if run.num_skipped:
        lines.append(
            f"training: {run.num_skipped:,} of {run.step:,} steps were skipped, their loss or gradient was not finite; "
            "their samples are in skipped_steps/"
        )
    for (first, warning), *others in found.values():
        alike = f" (alike on {', '.join(name for name, _ in others)})" if others else ""
        lines.append(f"{first}{alike}: {warning}")
    return lines


def curve_panels(run: RunHistory) -> list[Panel]:
    """How one run went."""
    panels = []
    terms = run.terms
    losses = {"loss": run.curves["loss"]} if "loss" in run.curves else {}
    if len(terms) > 1:
        losses |= terms
    series: list[tuple[str, Mapping[str, Curve], str, dict[str, Any]]] = [
        ("Loss and its terms", losses, "loss", {"rangemode": "tozero"}),
        ("Positive cosine while training", run.curves_of("positive_cosine/"), "mean cosine", {}),
        ("Temperatures", run.curves_of("temperature/"), "temperature", {}),
        ("Gradient norm", _one(run, "grad_norm"), "norm before clipping", {"rangemode": "tozero"}),
        ("Learning rate", _one(run, "lr"), "learning rate", {"rangemode": "tozero", "exponentformat": "power"}),
        ("Throughput", _one(run, "samples_per_s"), "samples / s", {"rangemode": "tozero"}),
    ]
    for title, curves, y_title, axis in series:
        if curves:
            value = _newest(curves) if len(curves) == 1 else ""
            figure = figures.curves_figure(curves, y_title, **axis)
            panels.append(Panel(title=title, figure=figures.figure_json(figure), value=value))
    if run.validations:
        row = headline_row(run, run.validations[-1]["metrics"])
        chance = 100 * row["chance_recall_at_1"] if row is not None else None
        figure = figures.score_figure({"validation": _validation_curve(run)}, chance)
        value = percent(run.validations[-1]["score"]) + (f" of {queries(row)}" if row is not None else "")
        panels.insert(1, Panel(title="Validation R@1", figure=figures.figure_json(figure), value=value))
    return panels


def compared_curve_panels(runs: Sequence[RunHistory]) -> list[Panel]:
    """Each metric of several runs on one figure."""
    panels = []
    if any(run.validations for run in runs):
        curves = {run.name: _validation_curve(run) for run in runs if run.validations}
        panels.append(_compared(runs, "Validation R@1", curves, "R@1 (%)", markers=True))
    names = dict.fromkeys(
        name
        for pick in (_loss_names, _cosine_names, _other_names)
        for run in runs
        for name in pick(run)
    )  # fmt: skip
    for name in names:
        curves = {run.name: run.curves[name] for run in runs if name in run.curves}
        title, unit = COMPARED.get(name, (name.replace("/", " · ").replace("_", " "), ""))
        panels.append(_compared(runs, title, curves, unit or title))
    return panels


COMPARED = {
    "loss": ("Loss", "loss"), "grad_norm": ("Gradient norm", "norm before clipping"),
    "lr": ("Learning rate", "learning rate"), "samples_per_s": ("Throughput", "samples / s"),
}  # fmt: skip


def _loss_names(run: RunHistory) -> list[str]:
    return ["loss", *(run.terms if len(run.terms) > 1 else [])]


def _cosine_names(run: RunHistory) -> list[str]:
    return [name for name in run.curves if name.startswith(("positive_cosine/", "temperature/"))]


def _other_names(run: RunHistory) -> list[str]:
    return ["grad_norm", "lr", "samples_per_s"]


def _compared(
    runs: Sequence[RunHistory], title: str, curves: Mapping[str, Curve], y_title: str, markers: bool = False
) -> Panel:
    figure = figures.curves_figure(curves, y_title, markers=markers)
    colours = figures.run_colours([run.name for run in runs])
    for trace in figure.data:
        trace.line.color = colours[trace.name]
    return Panel(title=title, figure=figures.figure_json(figure))


def time_panel(run: RunHistory, title: str) -> Panel | None:
    """Where the time of a run went."""
    if not run.bar_s:
        return None
    figure = figures.time_figure(run.bar_steps, run.bar_s, run.stage_s)
    return Panel(title=title, figure=figures.figure_json(figure), wide=True)


def differing_settings(runs: Sequence[RunHistory]) -> list[tuple[str, list[str]]]:
    """Keys of the config in which the runs differ, with the value in each."""
    flat = [_flatten("", run.config.model_dump(mode="json", exclude={"run_dir"})) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    return [
        (key, [values.get(key, "–") for values in flat])
        for key in keys
        if len({values.get(key) for values in flat}) > 1
    ]


def _flatten(place: str, value: Any) -> dict[str, str]:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in _flatten(f"{place}.{key}".lstrip("."), part).items()}
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return {k: v for i, part in enumerate(value) for k, v in _flatten(f"{place}.{i}", part).items()}
    return {place: str(value)}


def _one(run: RunHistory, name: str) -> dict[str, Curve]:
    return {name: run.curves[name]} if name in run.curves else {}


def _newest(curves: Mapping[str, Curve]) -> str:
    return f"{next(iter(curves.values())).values[-1]:.4g}"


def _validation_curve(run: RunHistory) -> Curve:
    stride = max(1, len(run.validations) // 200)
    kept = [*run.validations[:-1:stride], run.validations[-1]]
    return Curve(steps=[record["step"] for record in kept], values=[100 * record["score"] for record in kept])
