import math

import numpy as np
import pytest

from iwm_ray.evaluation.intervals import interval, means, seeds_interval


def test_the_interval_of_a_mean_is_about_two_standard_errors_wide() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = means({"a/b": values, "c": 2 * values + 1}, seed=0)
    error = values.std() / np.sqrt(400)
    assert found["a/b"] == pytest.approx(values.mean())
    assert found["a/b_low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found["a/b_high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert found["c_low"] == pytest.approx(2 * found["a/b_low"] + 1)  # one set of resamples for all figures


def test_equal_values_leave_no_doubt_and_seeds_differ() -> None:
    assert means({"a": np.full(5, 0.3)}, seed=0) == pytest.approx({"a": 0.3, "a_low": 0.3, "a_high": 0.3})
    values = np.random.default_rng(1).normal(size=30)
    assert means({"a": values}, seed=0) == means({"a": values}, seed=0) != means({"a": values}, seed=1)


def test_a_figure_that_is_no_mean() -> None:
    values = np.random.default_rng(2).normal(size=300)

    def spread(weights: np.ndarray) -> np.ndarray:
        mean = weights @ values / weights.sum()
        return np.sqrt(weights @ (values - mean) ** 2 / weights.sum())[None]

    low, high = interval(spread, 300, seed=0)
    assert low[0] < values.std() < high[0]
    assert high[0] - low[0] == pytest.approx(2 * 1.96 * values.std() / np.sqrt(600), rel=0.2)


def table(num_seeds, num_images, share, seed=0):
    return (np.random.default_rng(seed).random((num_seeds, num_images)) < share).astype(float)


def test_the_interval_of_one_seed_is_that_of_a_share():
    values = table(1, 500, 0.3)
    found, share = seeds_interval(values), values.mean()
    half = 1.96 * math.sqrt(share * (1 - share) / 500)
    assert found.mean == share
    assert found.low == pytest.approx(share - half, abs=0.1 * half)
    assert found.high == pytest.approx(share + half, abs=0.1 * half)


def test_over_images_it_is_that_of_the_slow_way():
    """Resample images, one by one; seeds that agree on every image add nothing."""
    values, generator = np.repeat(table(1, 60, 0.6), 3, axis=0), np.random.default_rng(1)
    means = []
    for _ in range(2000):
        images = generator.integers(60, size=60)
        means.append(np.mean([values[s, i] for i in images for s in range(3)]))
    low, high = np.quantile(means, (0.025, 0.975))
    found = seeds_interval(values)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.025)


def test_pairs_cancel():
    """Two arms that err on the same images differ by nothing, however uncertain each of them is."""
    values = table(3, 100, 0.5)
    found = seeds_interval(values - values, lowest=-1)
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_three_seeds_that_differ_are_covered_19_times_in_20():
    """Many experiments of three seeds whose expectations scatter around 0.5; the images say little."""
    generator, covered = np.random.default_rng(0), 0
    for _ in range(200):
        shares = generator.normal(0.5, 0.05, 3)
        found = seeds_interval((np.arange(1000) < 1000 * shares[:, None]).astype(float))
        covered += found.low <= 0.5 <= found.high
    assert 0.9 < covered / 200 < 0.99


def test_seeds_and_images_the_wider_one_counts():
    alike = table(2, 40, 0.5)
    alike[1] = alike[0]
    assert seeds_interval(alike) == seeds_interval(alike[:1])
    apart = np.array([np.zeros(40), np.ones(40)])
    assert (seeds_interval(apart).low, seeds_interval(apart).high) == (0, 1)  # no share lies beyond
    assert (seeds_interval(apart, lowest=-1).low, seeds_interval(apart).high) == (-1, 1)
