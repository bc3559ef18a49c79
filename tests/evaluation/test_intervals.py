import numpy as np
import pytest

from iwm_ray.evaluation.intervals import interval, means


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
