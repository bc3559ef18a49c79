"""Images as a user has them, and as a tuned model takes them."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_ray.data.decode import DecodeLimits, Undecodable, decode
from iwm_ray.errors import UsageError

AnyImage = str | Path | NDArray[np.uint8]
"""an image file, or `[h w 3]` RGB"""


def rgb_pixels(image: AnyImage, limits: DecodeLimits) -> NDArray[np.uint8]:
    """`[h w 3]` uint8; a file as training reads it: upright, transparent parts over the run's background.

    Raises:
        UsageError: no such file, no image in it, or no RGB image.
    """
    if isinstance(image, str | Path):
        try:
            return decode(Path(image).expanduser().read_bytes(), limits)
        except OSError as error:
            raise UsageError(f"image {image}: {error.strerror}; give the path of an image file") from None
        except Undecodable as fault:
            raise UsageError(f"image {image}: {fault.reason}; give another image") from None
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
        raise UsageError(
            f"image {_described(image)}: needs an image file or a NumPy array uint8 [h w 3]; give the file's path"
        )
    return image


def channels_first(image: NDArray[np.uint8]) -> Tensor:
    """`[h w 3]` -> `[3 h w]`, the same memory where that can be written to."""
    return torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)


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
