"""Features of whole images, and the state in which a model is measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from iwm_ray.model.iwm import IWM


@dataclass(frozen=True)
class Features:
    """What a frozen encoder makes of k images; the arrays may be memory-mapped."""

    values: NDArray[Any]
    """`[k n d]` tokens or `[k d]` pooled features, float32 or float16"""
    labels: NDArray[Any]
    """`[k]` int64 classes, -1: none"""
    samples: NDArray[Any]
    """`[k]` int64 sample numbers in the index that the images come from"""
    class_names: tuple[str, ...]
    hash: str
    """names encoder, images and transform"""


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own training flag back, also after an error.

    Mixed precision is the caller's: wrap the call in `torch.autocast` to measure as the run trains.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def model_device(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives."""
    return next(model.parameters()).device


def target_features(model: IWM, images: Tensor, batch_size: int) -> Tensor:
    """Mean over the tokens of the target encoder: the representation of kNN, RankMe and the linear probe.

    Args:
        model: used as it is; call inside `measuring`.
        images: `[b 3 h w]` uint8, on any device.
        batch_size: images in one forward pass.

    Returns:
        `[b d]` float32 on the model's device.
    """
    device = model_device(model)
    parts = [model.target_tokens(part.to(device)).float().mean(1) for part in images.split(batch_size)]
    return torch.cat(parts)
