import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iwm_ray.config import OptimizerConfig, ScheduleConfig
from iwm_ray.training.schedules import learning_rate, momentum, weight_decay

OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.04, weight_decay_end=0.4)
SCHEDULE = ScheduleConfig(warmup_fraction=0.2, lr_end=1e-5, momentum_start=0.99, stretch=1.25)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 2e-4),  # a fifth of the peak
        (10, 6e-4),  # half way up
        (20, 1e-3),  # the peak, after 20 of 100 steps
        (20 + 105 / 2, (1e-3 + 1e-5) / 2),  # half way down: the cosine takes 125 - 20 steps
        (20 + 35, 1e-5 + (1e-3 - 1e-5) * 0.75),  # cos(60 degrees) = 1/2
        (125, 1e-5),  # the end that a stretched run never reaches
    ],
)
def test_learning_rate_by_hand(step, expected):
    assert learning_rate(step, 100, OPTIMIZER, SCHEDULE) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.04), (62.5, 0.22), (125, 0.4), (125 / 3, 0.04 + 0.36 / 4)]
)
def test_weight_decay_by_hand(step, expected):
    assert weight_decay(step, 100, OPTIMIZER, SCHEDULE) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.99), (50, 0.994), (100, 0.998), (125, 1.0)])
def test_momentum_by_hand(step, expected):
    assert momentum(step, 100, SCHEDULE) == pytest.approx(expected, rel=1e-12)


def test_the_peak_follows_the_batch():
    config = OptimizerConfig(global_batch_size=512)
    no_warmup = ScheduleConfig(warmup_fraction=0)
    assert learning_rate(0, 100, config, no_warmup) == pytest.approx(2.5e-4)


@given(st.integers(1, 10_000), st.floats(0, 1), st.floats(1, 2), st.floats(0, 1))
def test_all_steps_stay_in_range(total_steps, warmup_fraction, stretch, share):
    schedule = ScheduleConfig(warmup_fraction=warmup_fraction, stretch=stretch)
    step = min(int(share * total_steps), total_steps - 1)
    assert 1e-6 <= learning_rate(step, total_steps, OPTIMIZER, schedule) <= 1e-3 * (1 + 1e-12)
    assert 0.04 * (1 - 1e-12) <= weight_decay(step, total_steps, OPTIMIZER, schedule) <= 0.4
    assert schedule.momentum_start <= momentum(step, total_steps, schedule) <= 1
    assert math.isfinite(learning_rate(step, total_steps, OPTIMIZER, schedule))
