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
    found, share = seeds_interval(values, over_seeds=False), values.mean()
    half = 1.96 * math.sqrt(share * (1 - share) / 500)
    assert found.mean == share
    assert found.low == pytest.approx(share - half, abs=0.1 * half)
    assert found.high == pytest.approx(share + half, abs=0.1 * half)


def test_it_is_that_of_the_slow_way():
    """Resample images and seeds, one by one."""
    values, generator = table(3, 60, 0.6), np.random.default_rng(1)
    means = []
    for _ in range(2000):
        seeds, images = generator.integers(3, size=3), generator.integers(60, size=60)
        means.append(np.mean([[values[s, i] for i in images] for s in seeds]))
    low, high = np.quantile(means, (0.025, 0.975))
    found = seeds_interval(values, over_seeds=True)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.025)


def test_pairs_cancel():
    """Two arms that err on the same images differ by nothing, however uncertain each of them is."""
    values = table(3, 100, 0.5)
    found = seeds_interval(values - values, over_seeds=True)
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_seeds_that_disagree_widen_it():
    values = np.stack([table(1, 400, share)[0] for share in (0.3, 0.5, 0.7)])
    over_images, over_both = (seeds_interval(values, over_seeds=choice) for choice in (False, True))
    assert over_both.high - over_both.low > 2 * (over_images.high - over_images.low)
