"""How sure a figure is: percentile intervals of the bootstrap over images."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from iwm_ray import randomness

Floats = NDArray[np.float64]

_NUM_RESAMPLES = 2000  # the ends are then steady to some hundredths of the interval
_ENDS = (0.025, 0.975)


def interval(statistic: Callable[[Floats], Floats], count: int, seed: int) -> tuple[Floats, Floats]:
    """Ends of the 95 % interval of figures that are computed from images.

    All figures are resampled together, so that those of one call can be compared.

    Args:
        statistic: from `[k]` weights, how often each image was drawn (ones: the images as they are), to `[c]`
            figures.
        count: k, the number of images.
        seed: of the resamples.

    Returns:
        `[c]` lower and `[c]` upper ends; NaN for a figure that is NaN in some resample.
    """
    figures = []
    for number in range(_NUM_RESAMPLES):
        uniform = randomness.uniforms(seed, 0, np.array([number]), "bootstrap", count)[0]
        weights = np.bincount((uniform * count).astype(np.int64), minlength=count)
        figures.append(statistic(weights.astype(np.float64)))
    low, high = np.quantile(np.stack(figures), _ENDS, axis=0)
    return low, high


def means(columns: Mapping[str, NDArray], seed: int) -> dict[str, float]:
    """The mean of each `[k]` column over the images as `<name>`, and its interval as `<name>_low`, `<name>_high`."""
    values = np.stack([np.asarray(column, np.float64) for column in columns.values()], axis=1)
    return named(tuple(columns), lambda weights: weights @ values / len(values), len(values), seed)


def named(
    names: tuple[str, ...], statistic: Callable[[Floats], Floats], count: int, seed: int
) -> dict[str, float]:
    """The figures of `statistic` (see `interval`) as `<name>`, with `<name>_low` and `<name>_high`."""
    low, high = interval(statistic, count, seed)
    found: dict[str, float] = {}
    for name, *figures in zip(names, statistic(np.ones(count)), low, high, strict=True):
        found |= zip((name, f"{name}_low", f"{name}_high"), map(float, figures), strict=True)
    return found
