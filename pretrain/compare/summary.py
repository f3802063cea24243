"""From the results of cells to statements: means with intervals, and differences from the baseline, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.compare.cells import Cell
from pretrain.compare.config import CompareConfig
from pretrain.compare.intervals import Interval, t_interval

NO_DIFFERENCE = "no difference beyond noise"
Values = Mapping[int, float]  # by seed


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric of one entry in one setting.

    difference: of the seeds that both have, the entry minus the baseline; None for the baseline, and where they share
    no seed. verdict: higher, lower, or "no difference beyond noise" where the interval of the difference holds 0.
    """

    setting: str
    label: str
    metric: str
    value: Interval
    difference: Interval | None
    verdict: str

    def record(self) -> dict[str, Any]:
        """A flat row for a table."""
        other = self.difference
        return {
            "setting": self.setting, "objective": self.label, "metric": self.metric, "num_seeds": self.value.num,
            "mean": self.value.mean, "low": self.value.low, "high": self.value.high,
            "num_shared_seeds": other.num if other else None, "difference": other.mean if other else None,
            "difference_low": other.low if other else None, "difference_high": other.high if other else None,
            "verdict": self.verdict,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """rows by (setting, label, metric). missing: cells without a result; notes: of cells without metrics, and why."""

    baseline: str
    rows: Mapping[tuple[str, str, str], Row]
    settings: Sequence[str]
    labels: Sequence[str]
    missing: Sequence[str]
    notes: Sequence[str]
    seconds: float

    def find(self, setting: str, label: str, metric: str) -> Row | None:
        """A row, None where no cell has the metric."""
        return self.rows.get((setting, label, metric))

    def labels_of(self, setting: str) -> list[str]:
        """Those that have a result there, in the order of the config."""
        there = {label for place, label, _ in self.rows if place == setting}
        return [label for label in self.labels if label in there]

    def metrics_of(self, setting: str) -> list[str]:
        """Names of the metrics measured there, in their order."""
        return sorted({metric for place, _, metric in self.rows if place == setting})


def summarise(config: CompareConfig, results: Sequence[tuple[Cell, Mapping[str, Any] | None]]) -> Comparison:
    """Rows of all cells that have a result; differences are taken against the baseline of the same setting."""
    baseline = config.baseline
    values: dict[tuple[str, str, str], dict[int, float]] = {}
    missing, notes, seconds = [], [], 0.0
    for cell, result in results:
        if result is None:
            missing.append(cell.name)
            continue
        seconds += result["seconds"]
        if result["note"]:
            notes.append(f"{cell.name}: {result['note']}")
        for metric, value in result["metrics"].items():
            values.setdefault((cell.setting, cell.label, metric), {})[cell.seed] = value
    places = {entry.label: place for place, entry in enumerate(config.objectives)}
    in_order = sorted((cell for cell, _ in results), key=lambda c: (places[c.entry.label], -len(c.modalities)))
    rows = {}
    for (setting, label, metric), found in values.items():
        reference = {} if label == baseline else values.get((setting, baseline, metric), {})
        rows[setting, label, metric] = _row(setting, label, metric, found, reference, is_baseline=label == baseline)
    return Comparison(
        baseline=baseline, rows=rows, settings=list(dict.fromkeys(cell.setting for cell, _ in results)),
        labels=list(dict.fromkeys(cell.label for cell in in_order)), missing=missing, notes=notes,
        seconds=seconds,
    )  # fmt: skip


def _row(setting: str, label: str, metric: str, found: Values, reference: Values, *, is_baseline: bool) -> Row:
    shared = sorted(found.keys() & reference.keys())
    difference = t_interval([found[seed] - reference[seed] for seed in shared]) if shared else None
    return Row(
        setting=setting,
        label=label,
        metric=metric,
        value=t_interval(list(found.values())),
        difference=difference,
        verdict="baseline" if is_baseline else _verdict(difference),
    )


def _verdict(difference: Interval | None) -> str:
    if difference is None:
        return "baseline not measured"
    if difference.low is None or difference.high is None:
        if difference.num == 1:
            return "one seed: no interval"
        return NO_DIFFERENCE if difference.mean == 0 else "the same in every seed: no interval"
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else NO_DIFFERENCE
