"""Intervals of means over a grid: what they cover, and what they do with clusters and holes."""

import math

import numpy as np
import pytest

from service.intervals import clustered


def grid_of(values):
    return {(f"s{i}", f"t{j}"): float(v) for i, row in enumerate(values) for j, v in enumerate(row)}


def test_mean_of_the_cells_that_are_there():
    found = clustered({("a", "x"): 1.0, ("a", "y"): 2.0, ("b", "x"): 6.0})
    assert (found.mean, found.pairs) == (3.0, 3)
    assert found.low < 3.0 < found.high


def test_equal_cells_have_no_spread():
    found = clustered(grid_of(np.full((4, 3), 0.5)))
    assert (found.low, found.high) == (0.5, 0.5)


def test_no_interval_from_one_subject():
    found = clustered({("a", "x"): 1.0, ("a", "y"): 2.0})
    assert math.isnan(found.low)
    assert found.as_dict() == {"mean": 1.5, "low": None, "high": None, "pairs": 2}


def test_nothing_measured():
    assert math.isnan(clustered({}).mean)


def test_spread_between_subjects_counts_once_per_subject():
    """Forty cells that repeat five subjects' values know the mean no better than five values do."""
    values = np.random.default_rng(1).normal(size=5)
    found = clustered(grid_of(np.repeat(values[:, None], 8, axis=1)))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / 5**0.5, rel=0.15)


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(150):
        values = rng.normal(size=(8, 1)) + rng.normal(size=(1, 6)) + rng.normal(size=(8, 6))
        found = clustered(grid_of(values), resamples=400)
        covered.append(found.low <= 0 <= found.high)
    assert 0.82 < np.mean(covered) < 1.0  # 95 % in the limit; few clusters make bootstrap intervals a little narrow
