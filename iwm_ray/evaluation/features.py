"""Features of whole images, and the state in which a model is measured."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from iwm_ray.model.iwm import IWM
from iwm_ray.randomness import integers


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
    unreadable: int = 0
    """images that were chosen but could not be decoded, and are left out"""

    def __len__(self) -> int:
        return len(self.labels)


def digest(*facts: Any) -> str:
    """Sixteen hexadecimal digits that name a content; facts are bytes, or what JSON can write."""
    found = hashlib.blake2b(digest_size=8)
    for fact in facts:
        content = fact if isinstance(fact, bytes) else json.dumps(fact).encode()
        found.update(len(content).to_bytes(8, "little"))
        found.update(content)
    return found.hexdigest()


def key(seed: int, purpose: str) -> int:
    """A seed for the permutations of one purpose, as `permute` takes it."""
    return int(integers(seed, 0, purpose, 1)[0] >> np.uint64(1))


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
