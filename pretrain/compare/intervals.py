"""Means over a few seeds with Student's t intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95
ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over `num` values and its 95 % interval; None where they do not spread: one value, or all equal.

    Equal means up to rounding: differences of equal recalls are.
    """

    num: int
    mean: float
    low: float | None
    high: float | None

    @property
    def half_width(self) -> float | None:
        """Half of high - low."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def t_interval(values: Sequence[float]) -> Interval:
    """mean +- t * s / sqrt(n), t of n - 1 degrees of freedom. Expects at least one value."""
    num, mean = len(values), fmean(values)
    if num == 1 or (spread := stdev(values)) <= ROUNDING * max(1.0, *map(abs, values)):
        return Interval(num=num, mean=mean, low=None, high=None)
    half = t_quantile(num - 1) * spread / math.sqrt(num)
    return Interval(num=num, mean=mean, low=mean - half, high=mean + half)


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """t with P(|T| <= t) = confidence for T of Student's distribution, by bisection."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if t_probability(middle, degrees) > confidence else (middle, high)
    return (low + high) / 2


def t_probability(t: float, degrees: int) -> float:
    """P(|T| <= t), the finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    squared_cosine = math.cos(angle) ** 2
    odd = degrees % 2 == 1
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(1 if odd else 0, degrees - 1, 2):
        total += term
        term *= squared_cosine * (power + 1) / (power + 2)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
