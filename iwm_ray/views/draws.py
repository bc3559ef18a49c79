"""The table of what was drawn: one row per sample, one column per parameter, in physical units.

The same float32 values are applied on the host, shipped to the device, written to the action log and read by
a replay, so all of them make the same views.

| column | type | meaning |
|---|---|---|
| image_height, image_width | int32 | size of the decoded image, pixels |
| crop_top, crop_left, crop_height, crop_width | float32 | box of the shared crop, fractions of the image |
| flip | bool | both views are mirrored left to right |
| VIEW_jitter | bool | the colour jitter of that view was applied (VIEW: source, target) |
| VIEW_brightness, VIEW_contrast, VIEW_saturation | float32 | factors, 1 where not applied |
| VIEW_hue | float32 | shift in turns, 0 where not applied |
| VIEW_order | uint8 `[b 4]` | order of 0 brightness, 1 contrast, 2 saturation, 3 hue |
| source_grayscale, source_blur, source_solarize | bool | applied |
| source_blur_radius | float32 | sigma in pixels of the view, 0 where not applied |
| source_solarize_threshold | uint8 | values at or above it are inverted where source_solarize is true |
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_ray import randomness

Draws = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Keys:
    """Which samples are drawn for; every draw is a pure function of one row of this and of its purpose."""

    seed: int
    """the run's seed"""
    epochs: NDArray[np.int64]
    """`[b]` pass over the data; the rows of a block may straddle two epochs"""
    samples: NDArray[np.int64]
    """`[b]` sample numbers"""

    def __len__(self) -> int:
        return len(self.samples)

    def uniforms(self, purpose: str, count: int) -> NDArray[np.float64]:
        """`[b count]` independent numbers in [0, 1); a row does not depend on the other rows."""
        table = np.empty((len(self), count))
        for epoch in np.unique(self.epochs):
            rows = np.flatnonzero(self.epochs == epoch)
            table[rows] = randomness.uniforms(self.seed, int(epoch), self.samples[rows], purpose, count)
        return table


def between(low: float, high: float, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """Numbers in [low, high) from numbers in [0, 1)."""
    return low + (high - low) * uniform
