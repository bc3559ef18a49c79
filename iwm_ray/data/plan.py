"""The order in which samples are read: any place of the whole run's stream is computable on its own.

Row k of the stream is `counter` k. It belongs to epoch k // samples_per_epoch, and an epoch's order is a
permutation of all samples keyed by (run seed, epoch). Nothing is stored, shuffled or replayed: a worker that
restarts at counter k asks for k.

The permutation is a Feistel network over a grid of rows x columns >= N points (Black and Rogaway, "Ciphers
with arbitrary finite domains", 2002): the two coordinates are moved in turn by a keyed hash of the other one,
which can be undone and so never maps two points to one. Points outside range(N) are sent through again until
they fall inside (cycle walking).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iwm_ray import randomness
from iwm_ray.errors import UsageError

Counters = NDArray[np.int64]

_NUM_ROUNDS = 12
_PURPOSE = "order"
_LARGEST = 1 << 62  # both sides of the grid must stay below 2**32


@dataclass(frozen=True)
class Plan:
    """The order of a run's samples.

    Every epoch leaves out the N modulo B samples that do not fill a global batch; they are others in each
    epoch.
    """

    seed: int
    """the run's seed"""
    num_samples: int
    """N, size of the index"""
    global_batch_size: int
    """B, samples of one optimizer step over all workers"""

    def __post_init__(self) -> None:
        if self.num_samples < self.global_batch_size:
            raise UsageError(
                f"optimizer.global_batch_size {self.global_batch_size} exceeds the {self.num_samples} images of "
                f"data.path; give more images or a global batch size of at most {max(self.num_samples, 1)}"
            )

    @property
    def samples_per_epoch(self) -> int:
        """Rows of the stream in one epoch: whole global batches."""
        return self.num_samples // self.global_batch_size * self.global_batch_size

    def locate(self, counters: Counters) -> tuple[Counters, Counters]:
        """`[n]` counters (0 or larger) -> `[n]` epochs and `[n]` places in the epoch's order."""
        if len(counters) and counters.min() < 0:
            raise ValueError("counters must lie in range(2**63)")
        epochs, positions = np.divmod(counters, self.samples_per_epoch)
        return epochs, positions

    def samples(self, counters: Counters) -> Counters:
        """`[n]` counters (0 or larger, in any order, of any epochs) -> `[n]` numbers of samples."""
        epochs, positions = self.locate(np.asarray(counters, np.int64))
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            numbers[rows] = permute(self.seed, int(epoch), positions[rows], self.num_samples)
        return numbers


def permute(seed: int, epoch: int, positions: Counters, num_samples: int) -> Counters:
    """Looks places up in a seeded permutation of range(num_samples), without making the permutation.

    Args:
        seed: the run's seed.
        epoch: names the permutation.
        positions: `[n]` places in range(num_samples).
        num_samples: length of the permutation, 1 to 2**62.

    Returns:
        `[n]` int64, different for different places.
    """
    if not 0 < num_samples <= _LARGEST:
        raise ValueError(f"num_samples {num_samples}: needs 1 to {_LARGEST}")
    if len(positions) and not 0 <= positions.min() <= positions.max() < num_samples:
        raise ValueError(f"positions must lie in range({num_samples})")
    keys = randomness.integers(seed, epoch, _PURPOSE, _NUM_ROUNDS)
    points = _feistel(positions.astype(np.uint64), num_samples, keys)
    outside = np.flatnonzero(points >= num_samples)
    while len(outside):
        points[outside] = _feistel(points[outside], num_samples, keys)
        outside = outside[points[outside] >= num_samples]
    return points.astype(np.int64)


def _feistel(points: NDArray[np.uint64], num_samples: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A keyed permutation of range(rows * columns), the smallest near-square grid of `num_samples`."""
    columns = np.uint64(math.isqrt(num_samples - 1) + 1)
    rows = np.uint64(-(-num_samples // int(columns)))
    row, column = points // columns, points % columns
    for even, odd in keys.reshape(-1, 2):
        row = (row + _hash(column, even, rows)) % rows
        column = (column + _hash(row, odd, columns)) % columns
    return row * columns + column


def _hash(values: NDArray[np.uint64], key: np.uint64, limit: np.uint64) -> NDArray[np.uint64]:
    """Numbers in range(limit) that look drawn at random for each (value, key); limit < 2**32.

    The mixer is that of SplitMix64 (Steele, Lea and Flood, 2014); the high half of its product with `limit`
    is the draw.
    """
    mixed = values * np.uint64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(32)) * limit >> np.uint64(32)
