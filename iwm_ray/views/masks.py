"""Which patches are predicted: per image the union of a few rectangles, or any patches; an exact number either way.

Differs from I-JEPA's sampler, whose faults are known: there one random number drives scale and aspect
together, and masks are cut to the shortest of the batch in raster order, which starves the last rows. Here
scale and aspect are independent, and every image has the same number of target patches by construction: of 16
sets of rectangles the one whose union comes closest is taken, and the few patches that it lacks or exceeds
are added or removed uniformly at random.

Random masks (MAE, arXiv 2111.06377, section 3) are the same thing with rectangles of one patch, none twice.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from iwm_ray.config import MasksConfig
from iwm_ray.errors import UsageError
from iwm_ray.views.draws import Keys, between

_NUM_CANDIDATES = 16
_RANDOM_SHARE = 0.75  # of MAE
_NUM_IMAGES_FOR_MEAN = 256  # x 16 candidates: the mean union is known to about 0.1 patches


@dataclass(frozen=True)
class Masks:
    """The masks of a block of samples. Positions count row by row: row * columns + column."""

    context_idx: NDArray[np.int16]
    """`[b c]` positions of the source patches that the context encoder sees, ascending: all not predicted"""
    target_idx: NDArray[np.int16]
    """`[b t]` positions that are predicted, ascending"""
    blocks: NDArray[np.int16]
    """`[b k 4]` top, left, height, width of the rectangles, patches; their union is the target up to the few
    patches that were added or removed to make the number exact. Of random masks: each target patch"""

    def __len__(self) -> int:
        return len(self.target_idx)


@dataclass(frozen=True)
class MaskSampler:
    """Draws masks (IWM, section 3; METHOD: step 5). `from_config` checks the settings."""

    grid: tuple[int, int]
    """(rows, columns) of patches"""
    style: Literal["blocks", "random"]
    num_blocks: int
    block_scale: tuple[float, float]
    block_aspect: tuple[float, float]
    num_target_tokens: int
    """patches predicted in every image"""

    @classmethod
    def from_config(cls, config: MasksConfig, grid: tuple[int, int]) -> Self:
        """The sampler of a configuration on a grid of (rows, columns) patches.

        Raises:
            UsageError: no mask of that kind fits the grid.
        """
        settings = (config.num_blocks, config.block_scale, config.block_aspect, config.num_target_tokens)
        sampler = cls(grid, config.style, *settings)
        if config.style == "blocks":
            sampler._check_blocks()
        sampler = replace(sampler, num_target_tokens=config.num_target_tokens or sampler._usual_count())
        sampler._check_target_tokens()
        return sampler

    @property
    def num_context_tokens(self) -> int:
        """Patches that the context encoder sees in every image."""
        return self.grid[0] * self.grid[1] - self.num_target_tokens

    def draw(self, seed: int, epochs: NDArray[np.int64], samples: NDArray[np.int64]) -> Masks:
        """Draws the masks of `[b]` samples; a row depends on nothing but its own seed, epoch and sample."""
        keys = Keys(seed, epochs, samples)
        target, blocks = self._draw_random(keys) if self.style == "random" else self._draw_blocks(keys)
        return Masks(
            context_idx=np.nonzero(~target)[1].reshape(len(keys), self.num_context_tokens).astype(np.int16),
            target_idx=np.nonzero(target)[1].reshape(len(keys), self.num_target_tokens).astype(np.int16),
            blocks=blocks.astype(np.int16),
        )

    def _draw_random(self, keys: Keys) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """`[b n]` true for the patches with the smallest of n drawn numbers, and `[b t 4]` these patches."""
        num_tokens = self.grid[0] * self.grid[1]
        order = keys.uniforms("mask_random", num_tokens).argsort(axis=1, kind="stable")
        chosen = np.sort(order[:, : self.num_target_tokens], axis=1)
        target = np.zeros((len(keys), num_tokens), bool)
        np.put_along_axis(target, chosen, True, axis=1)
        side = np.ones_like(chosen)
        return target, np.stack([*np.divmod(chosen, self.grid[1]), side, side], axis=-1)

    def _draw_blocks(self, keys: Keys) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """`[b n]` true for the patches that are predicted, and `[b k 4]` the rectangles that they come from."""
        blocks = self._candidates(keys, "mask")
        unions = _union(blocks, self.grid)
        chosen = np.abs(unions.sum(axis=2) - self.num_target_tokens).argmin(axis=1)
        rows = np.arange(len(keys))
        target = unions[rows, chosen]
        _repair(target, self.num_target_tokens, keys)
        return target, blocks[rows, chosen]

    def _candidates(self, keys: Keys, purpose: str) -> NDArray[np.int64]:
        """`[b 16 k 4]` rectangles (top, left, height, width); all places where one fits are equally likely."""
        uniform = keys.uniforms(purpose, _NUM_CANDIDATES * self.num_blocks * 2)
        uniform = uniform.reshape(-1, _NUM_CANDIDATES, self.num_blocks, 2)
        scale, top = _two(uniform[..., 0])
        aspect, left = _two(uniform[..., 1])
        height, width = self._size(between(*self.block_scale, scale), between(*self.block_aspect, aspect))
        top = np.floor(top * (self.grid[0] - height + 1))
        left = np.floor(left * (self.grid[1] - width + 1))
        return np.stack([top, left, height, width], axis=-1).astype(np.int64)

    def _size(self, scale: NDArray, aspect: NDArray) -> tuple[NDArray, NDArray]:
        """(height, width) in whole patches of rectangles of that share of the grid and that aspect."""
        area = scale * (self.grid[0] * self.grid[1])
        return np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))

    def _extreme_sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """((smallest, largest) height, (smallest, largest) width) of a rectangle, patches."""
        (small, large), (flat, tall) = self.block_scale, self.block_aspect
        height, width = self._size(np.array([small, large, small, large]), np.array([flat, tall, tall, flat]))
        return (int(height[0]), int(height[1])), (int(width[2]), int(width[3]))

    def _usual_count(self) -> int:
        """Patches predicted where the configuration leaves it open."""
        if self.style == "random":
            return round(_RANDOM_SHARE * self.grid[0] * self.grid[1])
        return self._mean_union()

    def _mean_union(self) -> int:
        """Mean number of patches in a union, rounded, from a fixed draw: the same for every seed of a run."""
        keys = Keys(0, np.zeros(_NUM_IMAGES_FOR_MEAN, np.int64), np.arange(_NUM_IMAGES_FOR_MEAN))
        return round(float(_union(self._candidates(keys, "mask_mean"), self.grid).sum(axis=2).mean()))

    def _check_blocks(self) -> None:
        heights, widths = self._extreme_sizes()
        scale, aspect = ("{:g} {:g}".format(*limits) for limits in (self.block_scale, self.block_aspect))
        grid = "{} x {}".format(*self.grid)
        setting = f"masks.block_scale {scale} with masks.block_aspect {aspect} on a grid of {grid} patches"
        if min(heights[0], widths[0]) < 1:
            raise UsageError(
                f"{setting}: blocks as small as {heights[0]} x {widths[0]} patches, at least 1 x 1 is needed; raise "
                "the first value of masks.block_scale"
            )
        if heights[1] > self.grid[0] or widths[1] > self.grid[1]:
            raise UsageError(
                f"{setting}: blocks of up to {heights[1]} x {widths[1]} patches do not fit; lower the second "
                "value of masks.block_scale or bring masks.block_aspect closer to 1"
            )

    def _check_target_tokens(self) -> None:
        num_tokens, wanted = self.grid[0] * self.grid[1], self.num_target_tokens
        grid = "{} x {}".format(*self.grid)
        if wanted >= num_tokens:
            others = "" if self.style == "random" else ", masks.num_blocks or masks.block_scale"
            raise UsageError(
                f"masks.num_target_tokens {wanted} (where it is 0: the usual number) on a grid of {grid} patches: at "
                f"most {num_tokens - 1}, since the context needs one; lower it{others}"
            )
        if self.style == "random":
            return
        heights, widths = self._extreme_sizes()
        smallest, largest = heights[0] * widths[0], self.num_blocks * heights[1] * widths[1]
        if not smallest <= wanted <= largest:
            raise UsageError(
                f"masks.num_target_tokens {wanted}: the union of masks.num_blocks {self.num_blocks} on a grid of "
                f"{grid} has {smallest} to {largest} patches; choose a number in that range"
            )


def _two(uniform: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cuts each number of 53 random bits into two independent ones, of 27 and 26 bits, all in [0, 1)."""
    fraction, whole = np.modf(uniform * 2.0**26)
    return fraction, whole * 2.0**-26


def _union(blocks: NDArray[np.int64], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """`[b j k 4]` rectangles -> `[b j n]`, true for the patches that at least one of the `k` covers."""
    # Rectangles last while it is computed: NumPy's innermost loop is then a long one.
    top, left, height, width = np.ascontiguousarray(np.moveaxis(blocks, (3, 2), (0, 1)))[:, :, None]
    row, column = (np.arange(side)[:, None, None] for side in grid)
    in_rows = (top <= row) & (row < top + height)
    in_columns = (left <= column) & (column < left + width)
    union = np.zeros((*grid, *blocks.shape[:2]), bool)
    for block in range(blocks.shape[2]):
        union |= in_rows[block, :, None] & in_columns[block, None]
    return np.moveaxis(union.reshape(grid[0] * grid[1], *blocks.shape[:2]), 0, 2)


def _repair(target: NDArray[np.bool_], wanted: int, keys: Keys) -> None:
    """Adds or removes patches of `[b n]`, in place and uniformly at random, until every row has `wanted`."""
    excess = target.sum(axis=1) - wanted
    uniform = keys.uniforms("mask_repair", int(np.abs(excess).max(initial=0)))
    for step in range(uniform.shape[1]):
        rows = np.flatnonzero(np.abs(excess) > step)
        pool = target[rows] == (excess[rows] > 0)[:, None]
        pick = np.floor(uniform[rows, step] * pool.sum(axis=1))
        token = (pool.cumsum(axis=1) > pick[:, None]).argmax(axis=1)
        target[rows, token] ^= True
