"""The control of every claim about actions: the same actions, each in another row's place."""

import numpy as np
from numpy.typing import NDArray

from iwm_ray import randomness


def derangement(seed: int, number: int, count: int) -> NDArray[np.int64]:
    """A random permutation that leaves nothing in its place: one step along a random circle.

    Args:
        seed: the run's seed.
        number: which permutation of that seed, 0 or more.
        count: how many rows, at least 2.

    Returns:
        `[count]` the row that stands in for each row.
    """
    circle = np.argsort(randomness.uniforms(seed, 0, np.array([number]), "derangement", count)[0])
    shuffled = np.empty(count, np.int64)
    shuffled[circle] = np.roll(circle, 1)
    return shuffled
