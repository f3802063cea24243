"""t intervals against published quantiles, and against what they promise."""

from __future__ import annotations

import random

import pytest

from pretrain.compare.intervals import t_interval, t_quantile


@pytest.mark.parametrize(  # Student's t, two-sided 95 %: any printed table
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (10, 2.22814), (30, 2.04227),
     (120, 1.97993)],
)  # fmt: skip
def test_quantiles_are_the_printed_ones(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, rel=1e-5)


def test_other_confidences() -> None:
    assert t_quantile(4, 0.99) == pytest.approx(4.60409, rel=1e-5)
    assert t_quantile(7, 0.9) == pytest.approx(1.89458, rel=1e-5)


def test_interval_of_known_values() -> None:
    found = t_interval([1.0, 2.0, 3.0])  # s = 1
    assert (found.num, found.mean) == (3, 2.0)
    assert found.half_width == pytest.approx(4.30265 / 3**0.5, rel=1e-5)


def test_one_value_has_no_interval() -> None:
    found = t_interval([0.5])
    assert (found.mean, found.low, found.high, found.half_width) == (0.5, None, None, None)


def test_values_that_do_not_spread_have_none_either() -> None:
    """Recalls are steps of one over the candidates: two equal ones are no certainty."""
    assert t_interval([0.25] * 4).half_width is None


@pytest.mark.parametrize("values", [[0.3 - 0.2, 0.2 - 0.1], [0.031 - 0.001, 0.13 - 0.1, 0.53 - 0.5]])
def test_equal_differences_have_none_whatever_their_last_bits(values: list[float]) -> None:
    assert len(set(values)) > 1
    assert t_interval(values).low is None


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    draws = random.Random(0)
    hits = 0
    for _ in range(1500):
        found = t_interval([draws.gauss(3.0, 2.0) for _ in range(5)])
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 3.0 <= found.high
    assert 0.927 <= hits / 1500 <= 0.973  # four standard errors
