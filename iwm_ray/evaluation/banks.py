"""The banks of the MRR: many jittered views of one clean image, and the actions that lead to them."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_ray import randomness
from iwm_ray.views.device import device_views
from iwm_ray.views.draws import Draws, Keys
from iwm_ray.views.policy import ViewPolicy


@dataclass(frozen=True)
class _BankKeys(Keys):
    """Draws for `num_views` views of each image; a larger bank begins with the smaller one."""

    num_views: int

    def __len__(self) -> int:
        return len(self.samples) * self.num_views

    def uniforms(self, purpose: str, count: int) -> NDArray[np.float64]:
        numbers = randomness.uniforms(self.seed, 0, self.samples, f"mrr {purpose}", self.num_views * count)
        return numbers.reshape(-1, count)


def bank_draws(policy: ViewPolicy, numbers: NDArray[np.int64], num_views: int, seed: int) -> Draws:
    """Draws of the banks of `[k]` image numbers: nothing but the target jitter, always applied.

    Returns:
        k * num_views rows, the views of an image one after the other; they depend on the image's number only.
    """
    keys = _BankKeys(seed, np.zeros_like(numbers), numbers, num_views)
    return policy.identity(len(keys)) | replace(policy.target_jitter, probability=1.0).sample(keys)


def alone(policy: ViewPolicy, draws: Draws, component: str) -> Draws:
    """The same draws with all of the jitter but `component` at its identity."""
    identity = policy.target_jitter.identity(len(draws["target_jitter"]))
    kept = ("target_jitter", "target_order", f"target_{component}")
    return draws | {name: column for name, column in identity.items() if name not in kept}


def clean_actions(policy: ViewPolicy, draws: Draws) -> NDArray[np.float32]:
    """`[n a]`: what leads from the clean image to the views; its negative leads back."""
    # Where sources are made from targets, the target's jitter cancels and the action leaves it out; between
    # the clean image and its view it does not cancel.
    return replace(policy, source_base="crop").encode(draws)


def bank_views(policy: ViewPolicy, image: NDArray[np.uint8], draws: Draws) -> NDArray[np.uint8]:
    """The views of one image's bank: `[s s 3]` and n rows of draws -> `[n s s 3]`."""
    rows = range(len(draws["target_jitter"]))
    return np.stack([policy.target_jitter.apply(image, draws, row) for row in rows])


def bank_tensors(
    policy: ViewPolicy, image: NDArray[np.uint8], draws: Draws, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`[1 3 s s]` clean image and `[n 3 s s]` views of its bank, uint8 on `device`."""
    clean = torch.tensor(image)[None].to(device)
    # On CPUs OpenCV is ten times faster than torch.
    if device.type == "cpu":
        views = torch.from_numpy(bank_views(policy, image, draws)).permute(0, 3, 1, 2)
    else:
        views = device_views(clean.expand(len(draws["flip"]), -1, -1, -1), draws, policy)[1]
    return clean.permute(0, 3, 1, 2), views
