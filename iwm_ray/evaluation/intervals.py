"""How sure a figure is: percentile intervals of the bootstrap over images, Student's t over seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from iwm_ray import randomness

Floats = NDArray[np.float64]

_NUM_RESAMPLES = 2000  # the ends are then steady to some hundredths of the interval
_ENDS = (0.025, 0.975)
_AT_ONCE = 100  # resamples of a table; bounds the memory of the table of counts


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


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    def over_seeds(self, values: Sequence[float], lowest: float) -> "Interval":
        """No narrower than Student's t over repetitions; of one repetition it stays as it is, over images alone.

        Args:
            values: of each seed; the interval is of their mean.
            lowest: that a value can be; the highest is 1.
        """
        low, high = np.clip(repetitions_interval(values), lowest, 1)
        return Interval(self.mean, float(np.fmin(self.low, low)), float(np.fmax(self.high, high)))


def seeds_interval(values: NDArray[np.floating], lowest: float = 0.0) -> Interval:
    """95 % interval of the mean of a table: the wider of the bootstrap's over test images and Student's t over seeds.

    Values of one image stay together, and so do those of one seed: the interval of a difference is paired over both. (To
    resample three seeds, of which there are ten different choices, gives too narrow an interval.)

    Args:
        values: `[s k]` of s seeds and k images; of one seed the interval is over images alone.
        lowest: that a value can be; the highest is 1.
    """
    num_images = values.shape[1]
    generator = np.random.Generator(np.random.Philox(0))
    by_image, means = values.mean(0), []
    for _ in range(_NUM_RESAMPLES // _AT_ONCE):
        images = generator.multinomial(num_images, np.full(num_images, 1 / num_images), _AT_ONCE)
        means.append(images @ by_image / num_images)
    low, high = np.quantile(np.concatenate(means), _ENDS)
    over_images = Interval(float(values.mean()), float(low), float(high))
    return over_images.over_seeds(values.mean(1).tolist(), lowest)


def repetitions_interval(values: Sequence[float], comparisons: int = 1) -> tuple[float, float]:
    """Ends of the 95 % interval (Student's t) of the mean of repetitions; NaN of fewer than two.

    Args:
        values: of the repetitions.
        comparisons: so many such intervals hold at once, 95 % of the time (Bonferroni).
    """
    count = len(values)
    if count < 2:
        return np.nan, np.nan
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stdtrit(count - 1, 1 - _ENDS[0] / comparisons)) * spread / count**0.5
    return mean - half, mean + half
