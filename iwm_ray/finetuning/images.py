"""Images as a user has them, and as a tuned model takes them."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from iwm_ray.errors import UsageError

AnyImage = NDArray[np.uint8] | Image.Image
"""`[h w 3]` RGB, or a Pillow image of any mode"""


def rgb_pixels(image: AnyImage) -> NDArray[np.uint8]:
    """`[h w 3]` uint8.

    Raises:
        UsageError: no RGB image.
    """
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
        raise UsageError(
            f"image {_described(image)}: needs a NumPy array uint8 [h w 3] or a Pillow image; give PIL.Image.open(file)"
        )
    return image


def channels_first(image: NDArray[np.uint8]) -> Tensor:
    """`[h w 3]` -> `[3 h w]`, a copy."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def check_images(images: Tensor, side: int) -> None:
    """Checks what is given to `predict`.

    Raises:
        UsageError: it is not `[b 3 side side]` uint8.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.shape[1:] != (3, side, side):
        raise UsageError(
            f"images {_described(images)}: needs a torch tensor uint8 [b 3 {side} {side}]; "
            "give torch.stack([model.fit(image)])"
        )


def _described(value: object) -> str:
    """`ndarray float64 [2, 3]`"""
    words = [type(value).__name__]
    if isinstance(value, np.ndarray | Tensor):
        words += [str(value.dtype), str(list(value.shape))]
    return " ".join(words)
