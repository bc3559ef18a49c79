import math

import numpy as np
import pytest

from iwm_ray.finetuning.intervals import bootstrap


def table(num_seeds, num_images, share, seed=0):
    return (np.random.default_rng(seed).random((num_seeds, num_images)) < share).astype(float)


def test_the_interval_of_one_seed_is_that_of_a_share():
    values = table(1, 500, 0.3)
    found, share = bootstrap(values, over_seeds=False), values.mean()
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
    found = bootstrap(values, over_seeds=True)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.025)


def test_pairs_cancel():
    """Two arms that err on the same images differ by nothing, however uncertain each of them is."""
    values = table(3, 100, 0.5)
    found = bootstrap(values - values, over_seeds=True)
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_seeds_that_disagree_widen_it():
    values = np.stack([table(1, 400, share)[0] for share in (0.3, 0.5, 0.7)])
    over_images, over_both = (bootstrap(values, over_seeds=choice) for choice in (False, True))
    assert over_both.high - over_both.low > 2 * (over_images.high - over_images.low)
