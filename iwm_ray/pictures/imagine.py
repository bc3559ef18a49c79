"""Tokens to draw: what the target encoder makes of views, and what the predictor imagines from the clean image."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_ray.evaluation.features import model_device
from iwm_ray.model.iwm import IWM


def view_tokens(model: IWM, views: NDArray[np.uint8], batch_size: int) -> Tensor:
    """`[v s s 3]` views -> `[v n d]`, what the predictor is trained to predict; call inside `measuring`."""
    device = model_device(model)
    parts = _channels_first(views).tensor_split(math.ceil(len(views) / batch_size))
    return torch.cat([model.target_tokens(part.to(device)) for part in parts])


def imagined_tokens(
    model: IWM, image: NDArray[np.uint8], actions: NDArray[np.float32], batch_size: int
) -> Tensor:
    """`[s s 3]` clean image and `[v a]` actions -> `[v n d]`, predicted at every position; call inside `measuring`."""
    device = model_device(model)
    context = model.encoder(_channels_first(image[None]).to(device))  # once for all actions
    grid = torch.arange(context.shape[1], device=device)
    found = []
    for part in torch.from_numpy(actions).to(device).tensor_split(math.ceil(len(actions) / batch_size)):
        idx = grid.expand(len(part), -1)
        found.append(model.predictor(context.expand(len(part), -1, -1), idx, idx, part))
    return torch.cat(found)


def _channels_first(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)
