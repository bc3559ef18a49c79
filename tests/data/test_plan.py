import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_ray.data.plan import Plan, permute
from iwm_ray.errors import UsageError


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 7, 16, 97, 1000, 4095, 4097, 65537])
def test_permute_visits_every_sample_once(num_samples: int) -> None:
    for epoch in range(3):
        order = permute(11, epoch, np.arange(num_samples), num_samples)
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(range(num_samples))


@settings(max_examples=30, deadline=None)
@given(
    num_samples=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000), data=st.data()
)
def test_any_place_is_computable_alone(num_samples: int, seed: int, epoch: int, data: st.DataObject) -> None:
    order = permute(seed, epoch, np.arange(num_samples), num_samples)
    places = data.draw(st.lists(st.integers(0, num_samples - 1), max_size=8))
    alone = permute(seed, epoch, np.array(places, np.int64), num_samples)
    assert alone.tolist() == order[places].tolist()


def test_orders_differ_between_epochs_and_seeds() -> None:
    places = np.arange(500)
    orders = [permute(seed, epoch, places, 500) for seed in range(4) for epoch in range(4)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert np.mean(first == second) < 0.03  # two random orders agree in one place of 500


def test_order_is_uncorrelated_with_place() -> None:
    order = permute(3, 0, np.arange(100_000), 100_000)
    limit = 4 / math.sqrt(100_000)  # four standard deviations
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < limit
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < limit
    assert np.mean(np.abs(np.diff(order)) == 1) < 2e-4  # neighbours are parted


@pytest.mark.parametrize("num_samples", [5, 16, 30])
def test_every_place_holds_every_sample_equally_often(num_samples: int) -> None:
    num_epochs = 2000
    orders = np.stack([permute(1, epoch, np.arange(num_samples), num_samples) for epoch in range(num_epochs)])
    counts = np.stack([np.bincount(orders[:, place], minlength=num_samples) for place in range(num_samples)])
    expected = num_epochs / num_samples
    chi_squared = ((counts - expected) ** 2 / expected).sum() / (num_samples - 1) ** 2
    assert 0.5 < chi_squared < 1.6


def test_small_sets_see_every_order() -> None:
    orders = [tuple(permute(0, epoch, np.arange(4), 4)) for epoch in range(2400)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 24
    assert counts.min() > 60
    assert counts.max() < 145


def test_golden_order() -> None:
    """These values are part of the promise that a seed repeats a run in every later version."""
    assert permute(0, 0, np.arange(16), 16).tolist() == [4, 2, 0, 11, 1, 7, 13, 6, 9, 12, 10, 15, 8, 3, 14, 5]
    assert permute(7, 3, np.arange(5), 1281167).tolist() == [626754, 1277257, 1047531, 766729, 604791]
    places = np.array([0, 10**9 - 1, 123456789])
    assert permute(7, 3, places, 10**9).tolist() == [194905087, 333407124, 147364648]
    stream = Plan(5, 10, 4).samples(np.arange(20))
    assert stream.tolist() == [9, 3, 5, 8, 2, 6, 7, 0, 7, 6, 1, 2, 8, 9, 0, 5, 8, 7, 9, 1]


def test_memory_does_not_grow_with_the_data_set() -> None:
    """10**18 samples: anything that depended on their number would fail at once."""
    plan = Plan(0, 10**18, 2048)
    numbers = plan.samples(np.array([0, 1, plan.samples_per_epoch - 1, plan.samples_per_epoch]))
    assert len(set(numbers.tolist())) == 4
    assert numbers.min() >= 0
    assert numbers.max() < 10**18


def test_stream_is_the_epochs_one_after_another() -> None:
    plan = Plan(seed=9, num_samples=23, global_batch_size=5)
    assert plan.samples_per_epoch == 20
    twin = [permute(9, epoch, np.arange(23), 23)[:20] for epoch in range(3)]  # slow and obvious
    assert plan.samples(np.arange(60)).tolist() == np.concatenate(twin).tolist()
    epochs, positions = plan.locate(np.array([0, 19, 20, 59]))
    assert epochs.tolist() == [0, 0, 1, 2]
    assert positions.tolist() == [0, 19, 0, 19]


def test_counters_may_come_in_any_order_and_straddle_epochs() -> None:
    plan = Plan(1, 50, 8)
    stream = plan.samples(np.arange(200))
    counters = np.array([199, 0, 47, 48, 49, 120, 0])
    assert plan.samples(counters).tolist() == stream[counters].tolist()
    assert plan.samples(np.zeros(0, np.int64)).shape == (0,)


def test_left_out_samples_rotate() -> None:
    plan = Plan(2, 103, 10)
    seen = plan.samples(np.arange(100 * 40)).reshape(40, 100)
    left_out = [frozenset(range(103)) - frozenset(epoch.tolist()) for epoch in seen]
    assert all(len(rest) == 3 for rest in left_out)
    assert len(set(left_out)) > 35
    assert len(frozenset.union(*left_out)) > 50


def test_fewer_images_than_a_batch_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"global_batch_size 32 exceeds the 10 images"):
        Plan(0, 10, 32)
    assert Plan(0, 1, 1).samples(np.arange(3)).tolist() == [0, 0, 0]


def test_places_outside_the_epoch_are_refused() -> None:
    for places in ([-1], [10]):
        with pytest.raises(ValueError, match=r"range\(10\)"):
            permute(0, 0, np.array(places), 10)
    with pytest.raises(ValueError, match="range"):
        Plan(0, 10, 5).samples(np.array([-1]))
