"""The figures of a report, as plotly JSON. Text and grid take their colours from the page, in its theme."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from pretrain.report.history import Curve
from pretrain.report.projection import Projection
from pretrain.report.scores import ScoreSamples
from pretrain.scoring.names import SCORE_LABELS

MODALITY_COLOURS = {"video": "#3d85d9", "audio": "#e07b39", "text": "#2ca37c"}
PAIR_COLOURS = {"video-audio": "#a06cd5", "video-text": "#1f9fb0", "audio-text": "#b99528"}
SERIES_COLOURS = ("#5b6ee1", "#e0609b", "#2ca37c", "#e0a13a", "#8b93a5", "#47b5d6", "#b5573f", "#7d9c3a")
STAGE_COLOURS = {
    "data": "#8f99ab", "pass_1": "#7fb2e8", "gather": "#e8b04b", "objective": "#b08be0", "pass_2": "#3d76c2",
    "step": "#3fa387", "checkpoint": "#d98cab", "validation": "#c9d16b", "report": "#c7b299",
}  # fmt: skip
POSITIVE, NEGATIVE, CHANCE = "#2ca37c", "#8f99ab", "#9aa1ad"
SCORE_COLOURS = {
    "cosine": "#3d85d9", "volume": "#a06cd5", "summed_cosine": "#2ca37c", "singular_value": "#e07b39",
    "centroid": "#b99528",
}  # fmt: skip
NUM_BINS = 50
HEIGHT_PX = 250


def figure_json(figure: go.Figure) -> str:
    """JSON that may stand inside a script element: no NaN, no "<"."""
    return json.dumps(_plain(figure.to_plotly_json()), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    """Numbers with six digits, nothing that JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _figure(x: dict[str, Any], y: dict[str, Any], **layout: Any) -> go.Figure:
    base = {
        "template": "none", "height": HEIGHT_PX, "margin": {"l": 12, "r": 12, "t": 8, "b": 8}, "hovermode": "x unified",
        "xaxis": {"automargin": True, "showgrid": False, "zeroline": False, "ticks": "outside", "ticklen": 4, **x},
        "yaxis": {"automargin": True, "zeroline": False, "nticks": 6, **y},
        "showlegend": False,  # the page draws it, where it wraps as text does
    }  # fmt: skip
    return go.Figure(layout=base | layout)


def colours_for(names: Sequence[str]) -> dict[str, str]:
    """The fixed colour of a modality or a pair; others get one by their place."""
    fixed = MODALITY_COLOURS | PAIR_COLOURS
    return {name: fixed.get(name, SERIES_COLOURS[place % len(SERIES_COLOURS)]) for place, name in enumerate(names)}


def curves_figure(curves: Mapping[str, Curve], y_title: str, *, markers: bool = False, **y: Any) -> go.Figure:
    """Metrics over steps; a name for each line where there are several."""
    figure = _figure({"title": {"text": "step"}}, {"title": {"text": y_title}, **y})
    colours = colours_for(list(curves))
    for name, curve in curves.items():
        points = markers or len(curve.steps) == 1
        figure.add_scatter(
            x=curve.steps, y=curve.values, name=name, mode="lines+markers" if points else "lines",
            line={"width": 1.7, "color": colours[name]}, marker={"size": 6}, hovertemplate="%{y:.4g}",
        )  # fmt: skip
    return figure


def score_figure(curves: Mapping[str, Curve], chance: float | None) -> go.Figure:
    """R@1 in per cent over steps, and what guessing would give."""
    figure = curves_figure(curves, "R@1 (%)", markers=True, rangemode="tozero")
    if chance is not None:
        figure.add_hline(y=chance, line={"dash": "dot", "width": 1.5, "color": CHANCE})
        figure.add_annotation(
            xref="paper",
            x=1,
            y=chance,
            yanchor="bottom",
            xanchor="right",
            showarrow=False,
            text=f"chance {chance:.3g} %",
        )
    return figure


def time_figure(steps: Sequence[int], seconds: Mapping[str, Sequence[float]], totals: Mapping[str, float]) -> go.Figure:
    """Seconds a step in each stage, stacked; the legend says each stage's share of the whole run."""
    figure = _figure(
        {"title": {"text": "step"}}, {"title": {"text": "seconds a step"}},
        barmode="stack", bargap=0.08, height=300,
    )  # fmt: skip
    whole_s = sum(totals.values()) or 1.0
    for place, (stage, values) in enumerate(seconds.items()):
        label = f"{stage.replace('_', ' ')} · {_percent(totals[stage] / whole_s)}"
        colour = STAGE_COLOURS.get(stage, SERIES_COLOURS[place % len(SERIES_COLOURS)])
        figure.add_bar(
            x=list(steps), y=list(values), name=label, marker={"color": colour, "line": {"width": 0}},
            hovertemplate="%{y:.3f} s",
        )  # fmt: skip
    return figure


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"


def retrieval_figure(groups: Mapping[str, Sequence[dict[str, Any]]]) -> go.Figure:
    """R@1 of every direction with its 95 % interval, and chance, in per cent.

    Args:
        groups: rows of retrieval reports by what gives them their colour: a score, or a run.
    """
    by_run = not set(groups) <= set(SCORE_COLOURS)
    labels = {name: [_direction(row, by_run) for row in rows] for name, rows in groups.items()}
    order = list(dict.fromkeys(label for found in labels.values() for label in found))
    figure = _figure(
        {"title": {"text": "R@1 (%)"}, "range": [-2, 102], "showgrid": True},
        {"range": [len(order) - 0.5, -0.5], "tickvals": list(range(len(order))), "ticktext": order, "nticks": None},
        hovermode="closest", height=60 + max(34, 16 * len(groups)) * len(order),
    )  # fmt: skip
    colours = SCORE_COLOURS if not by_run else run_colours(list(groups))
    several = [name for name in groups if by_run or name != "cosine"]  # drawn beside each other on a line
    chances: dict[str, float] = {}
    for name, rows in groups.items():
        shift = 0.3 * (several.index(name) - (len(several) - 1) / 2) if name in several else 0.0
        values = [100 * row["recall_at_1"] for row in rows]
        figure.add_scatter(
            x=values, y=[order.index(label) + shift for label in labels[name]], mode="markers",
            name=SCORE_LABELS.get(name, name), marker={"size": 9, "color": colours[name]},
            error_x={
                "type": "data", "symmetric": False, "thickness": 2, "width": 0,
                "array": [100 * row["recall_at_1_high"] - v for row, v in zip(rows, values, strict=True)],
                "arrayminus": [v - 100 * row["recall_at_1_low"] for row, v in zip(rows, values, strict=True)],
            },
            text=[_in_words(row) for row in rows], hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
        chances |= {label: 100 * row["chance_recall_at_1"] for label, row in zip(labels[name], rows, strict=True)}
    figure.add_scatter(
        x=list(chances.values()), y=[order.index(label) for label in chances], name="chance", mode="markers",
        marker={"symbol": "line-ns", "size": 17, "line": {"width": 2, "color": CHANCE}},
        hovertemplate="chance %{x:.2f} %<extra></extra>",
    )  # fmt: skip
    return figure


def run_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each of several runs."""
    return {name: SERIES_COLOURS[place % len(SERIES_COLOURS)] for place, name in enumerate(names)}


def _direction(row: dict[str, Any], with_score: bool) -> str:
    score = f" · {SCORE_LABELS.get(row['score'], row['score'])}" if with_score else ""
    return f"{row['query']} → {row['candidates']}{score}"


def _in_words(row: dict[str, Any]) -> str:
    low, high = 100 * row["recall_at_1_low"], 100 * row["recall_at_1_high"]
    return (
        f"{row['query']} → {row['candidates']} by {SCORE_LABELS.get(row['score'], row['score'])}<br>"
        f"R@1 {100 * row['recall_at_1']:.1f} % ({low:.1f} to {high:.1f}; n {row['num_queries']:,}), "
        f"R@5 {100 * row['recall_at_5']:.1f} %, R@10 {100 * row['recall_at_10']:.1f} %"
    )


def histogram_figure(samples: ScoreSamples) -> go.Figure:
    """Shares of matched and of unmatched tuples by score; a volume is drawn as such, where small is near."""
    sign = -1.0 if samples.name == "volume" else 1.0
    positive, negative = sign * samples.positive, sign * samples.negative
    both = torch.cat([positive, negative])
    both = both[both.isfinite()]
    low, high = (float(both.min()), float(both.max())) if len(both) else (0.0, 1.0)
    width = max(high - low, 1e-6) / NUM_BINS
    centres = [low + (i + 0.5) * width for i in range(NUM_BINS)]
    title = "volume (near is small)" if samples.name == "volume" else SCORE_LABELS.get(samples.name, "cosine")
    figure = _figure(
        {"title": {"text": title}}, {"title": {"text": "share (%)"}, "rangemode": "tozero"},
        barmode="overlay", bargap=0.02, height=220,
    )  # fmt: skip
    for name, values, colour in (("unmatched", negative, NEGATIVE), ("matched", positive, POSITIVE)):
        counts = _histogram(values, low, width)
        total = max(1, sum(counts))
        figure.add_bar(
            x=centres, y=[100 * count / total for count in counts], name=name, opacity=0.65,
            marker={"color": colour, "line": {"width": 0}}, hovertemplate="%{y:.1f} %",
        )  # fmt: skip
    return figure


def _histogram(values: Tensor, low: float, width: float) -> list[int]:
    finite = values[values.isfinite()].double()
    return torch.histc(finite, bins=NUM_BINS, min=low, max=low + NUM_BINS * width).long().tolist()


def projection_figure(projection: Projection, words: Mapping[int, str]) -> go.Figure:
    """A point a vector. words: what a row of the embeddings is (hover)."""
    first, second = projection.variance_share
    figure = _figure(
        {"title": {"text": f"first direction ({100 * first:.0f} % of variance)"}, "showgrid": True},
        {"title": {"text": f"second direction ({100 * second:.0f} %)"}},
        hovermode="closest", height=460,
    )  # fmt: skip
    colours = colours_for(list(projection.points))
    for name, points in projection.points.items():
        figure.add_scatter(
            x=points[:, 0].tolist(), y=points[:, 1].tolist(), name=name, mode="markers",
            marker={"size": 5, "opacity": 0.65, "color": colours[name]},
            text=[html.escape(words[row]) for row in projection.rows[name].tolist()],
            hovertemplate=f"<b>{html.escape(name)}</b> %{{text}}<extra></extra>",
        )  # fmt: skip
    return figure
