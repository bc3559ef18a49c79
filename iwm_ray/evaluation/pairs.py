"""Source and target views of held images, drawn as training draws them, but never seen there."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_ray.views.policy import ViewPolicy


@dataclass(frozen=True)
class Pairs:
    """v pairs of views of each of k images."""

    source: Tensor
    """`[k v 3 s s]` uint8, crop, flip, jitter and destructive transforms as the policy has them"""
    target: Tensor
    """`[k v 3 s s]` uint8"""
    action: Tensor
    """`[k v a]` float32, from source to target"""


def draw_pairs(
    policy: ViewPolicy, images: NDArray[np.uint8], numbers: NDArray[np.int64], seed: int, num_pairs: int
) -> Pairs:
    """Draws `num_pairs` pairs of each image.

    Args:
        policy: makes the views.
        images: `[k s s 3]` RGB, any size.
        numbers: `[k]`, which image each is: its pairs depend on its number, its pixels and the seed only.
        seed: of the draws.
        num_pairs: v.
    """
    # Epochs before the first: no training reaches them, and no other measurement.
    epochs = np.tile(-1 - np.arange(num_pairs), len(images))
    samples = np.repeat(np.asarray(numbers, np.int64), num_pairs)
    height, width = (np.full(len(samples), side, np.int64) for side in images.shape[1:3])
    draws = policy.draw(seed, epochs, samples, height, width)
    views = []
    for row in range(len(samples)):
        views.append(policy.views(policy.crop(images[row // num_pairs], draws, row), draws, row))
    source, target = (
        torch.from_numpy(np.stack(side)).permute(0, 3, 1, 2).unflatten(0, (len(images), num_pairs))
        for side in zip(*views, strict=True)
    )
    action = torch.from_numpy(policy.encode(draws)).unflatten(0, (len(images), num_pairs))
    return Pairs(source, target, action)
