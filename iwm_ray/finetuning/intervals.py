"""How sure an accuracy, and a difference of two, is."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_NUM_RESAMPLES = 2000
_AT_ONCE = 100  # resamples; bounds the memory of the table of counts


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: NDArray[np.floating], over_seeds: bool) -> Interval:
    """95 % percentile interval of the mean of a table, by resampling its test images and, if asked, its seeds.

    Values of one image stay together, and so do those of one seed: the interval of a difference is paired over both.
    Differs: with few seeds their resampling is coarse (three seeds: 10 different choices).

    Args:
        values: `[s k]` of s seeds and k images.
        over_seeds: whether the result is to hold for other seeds too.
    """
    num_seeds, num_images = values.shape
    generator = np.random.Generator(np.random.Philox(0))
    means = []
    for _ in range(_NUM_RESAMPLES // _AT_ONCE):
        images = generator.multinomial(num_images, np.full(num_images, 1 / num_images), _AT_ONCE)
        by_seed = (values @ images.T) / num_images
        seeds = np.ones((_AT_ONCE, num_seeds), np.int64)
        if over_seeds:
            seeds = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), _AT_ONCE)
        means.append((seeds.T * by_seed).sum(0) / num_seeds)
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))
