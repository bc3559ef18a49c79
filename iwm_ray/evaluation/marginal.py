"""Marginalised representations: what the world model expects of an image over all actions (METHOD, section 5)."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_ray.evaluation.banks import bank_draws, clean_actions
from iwm_ray.evaluation.features import model_device
from iwm_ray.model.iwm import IWM
from iwm_ray.views.policy import ViewPolicy


def marginal_features(
    model: IWM,
    policy: ViewPolicy,
    images: Tensor,
    numbers: NDArray[np.int64],
    *,
    seed: int,
    num_actions: int = 16,
    batch_size: int = 64,
    encoder: Literal["context", "target"] = "target",
) -> Tensor:
    """Mean of the predictions over sampled actions, and over the tokens: features for a probe.

    The paper averages 8 to 128 predictions and finds no gain for the linear probe (IWM, section on marginalisation).

    Args:
        model: used as it is; call inside `measuring`.
        policy: its target jitter, always applied, gives the actions.
        images: `[b 3 s s]` uint8, clean, on any device.
        numbers: `[b]`, which image each is: with the seed it determines the actions; more actions begin with the fewer.
        seed: of the actions.
        num_actions: M.
        batch_size: predictions in one forward pass.
        encoder: which one reads the images; the target encoder as in all frozen protocols.

    Returns:
        `[b d]` float32 on the model's device; a row does not depend on the other images.
    """
    device, features = model_device(model), []
    reader = model.encoder if encoder == "context" else model.target_encoder
    for image, number in zip(images, numbers, strict=True):
        draws = bank_draws(policy, np.array([number]), num_actions, seed)
        context = reader(image[None].to(device))
        grid = torch.arange(context.shape[1], device=device)[None]
        parts = []
        for action in torch.from_numpy(clean_actions(policy, draws)).to(device).split(batch_size):
            idx = grid.expand(len(action), -1)
            prediction = model.predictor(context.expand(len(action), -1, -1), idx, idx, action)
            parts.append(prediction.float().mean(1))
        features.append(torch.cat(parts).mean(0))
    return torch.stack(features)
