"""The two views made in batches by torch, on any device, from uint8 crops and the draws.

Every operation works on float32 that holds whole numbers and rounds as the host's uint8 operation does
(views/transforms.py), OpenCV's 8-bit HSV included. What holds is tested: at least 99.9 % of the values equal
the host's views and none is further away than two levels.

The draws stay on the host: which rows an operation touches is known there, so nothing waits for the device.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from iwm_ray.views.draws import Draws
from iwm_ray.views.policy import ViewPolicy
from iwm_ray.views.transforms import (
    HUE_LEVELS_TO_HSV,
    HUE_LEVELS_TO_RGB,
    LUMA,
    TRUNCATE,
    ColorJitter,
    blur_reach,
)

_LUMA_BITS = 15  # OpenCV's fixed-point luma
_LUMA_UNITS = (9798, 19235, 3735)
_HSV_BITS = 12  # OpenCV's fixed-point HSV


def device_views(crops: Tensor, draws: Draws, policy: ViewPolicy) -> tuple[Tensor, Tensor]:
    """Makes both views of a batch.

    Args:
        crops: `[b s s 3]` uint8 shared crops, on the device where the views are wanted.
        draws: the rows' draws, at least what `ViewPolicy.unpack` returns.
        policy: which says what the source view is made from.

    Returns:
        source and target, `[b 3 s s]` uint8.
    """
    with torch.no_grad(), torch.autocast(crops.device.type, enabled=False):  # the loop may be inside one
        images = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        target = _jitter(images, draws, policy.target_jitter)
        source = _jitter(images if policy.source_base == "crop" else target, draws, policy.source_jitter)
        _destroy(source, draws)
        return source.to(torch.uint8), target.to(torch.uint8)


def _jitter(images: Tensor, draws: Draws, jitter: ColorJitter) -> Tensor:
    """A jittered copy of `[b 3 s s]` images; each row has an order of its own."""
    images = images.clone()
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, shift_hue)
    applied, order = draws[f"{jitter.view}_jitter"], draws[f"{jitter.view}_order"]
    for place in range(order.shape[1]):
        for operation, function in enumerate(operations):
            rows = np.flatnonzero(applied & (order[:, place] == operation))
            _change(images, rows, function, draws[f"{jitter.view}_{jitter.NAMES[operation]}"][rows])
    return images


def _destroy(images: Tensor, draws: Draws) -> None:
    """Grayscale, blur and solarize, in place, on the rows that drew them."""
    _change(images, np.flatnonzero(draws["source_grayscale"]), to_gray)
    rows = np.flatnonzero(draws["source_blur"])
    _change(images, rows, gaussian_blur, _kernels(draws["source_blur_radius"][rows], images.shape[-1]))
    rows = np.flatnonzero(draws["source_solarize"])
    _change(images, rows, solarize, draws["source_solarize_threshold"][rows])


def _change(images: Tensor, rows: NDArray, function: Callable[..., Tensor], *parameters: NDArray) -> None:
    """Replaces some rows by `function(rows, *parameters)`; each parameter holds one value a row."""
    if len(rows) == 0:
        return
    index, *values = (_to_device(array, images.device) for array in (rows, *parameters))
    images.index_copy_(0, index, function(images.index_select(0, index), *values))


def _to_device(array: NDArray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """`[b 3 s s]` images with `[b]` factors."""
    return _blend(images, images.new_zeros(()), factor)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """`[b 3 s s]` images with `[b]` factors."""
    red, green, blue = images.sum(dim=(2, 3)).double().unbind(1)  # exact up to 256 x 256 pixels
    luma = (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue) / images[0, 0].numel()
    return _blend(images, (luma + 0.5).floor().float()[:, None, None, None], factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """`[b 3 s s]` images with `[b]` factors."""
    return _blend(images, _luma(images), factor)


def _blend(images: Tensor, base: Tensor, factor: Tensor) -> Tensor:
    """factor * images + (1 - factor) * base, cut to whole numbers in 0..255."""
    factor = factor[:, None, None, None]
    return torch.addcmul((1 - factor) * base + (TRUNCATE + 0.5), factor, images).floor_().clamp_(0, 255)


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """`[b 3 s s]` images with `[b]` hue shifts, by way of OpenCV's 8-bit HSV."""
    hue, saturation, value = _to_hsv(images)
    shifted = hue / HUE_LEVELS_TO_HSV + turns[:, None, None]
    rotated = ((shifted - shifted.floor()) * HUE_LEVELS_TO_RGB).round_()
    return torch.where(turns[:, None, None, None] == 0, images, _to_rgb(rotated, saturation, value))


def _to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[b 3 s s]` RGB -> three `[b s s]` whole numbers in 0..255."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    saturation = _divide(255, chroma, value)
    sector = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    )
    hue = _divide(HUE_LEVELS_TO_HSV / 6, sector, chroma)
    return torch.where(hue < 0, hue + HUE_LEVELS_TO_HSV, hue), saturation, value


def _divide(scale: float, numerator: Tensor, denominator: Tensor) -> Tensor:
    """scale * numerator / denominator in OpenCV's fixed-point arithmetic; 0 where the denominator is 0."""
    unit = 2.0**_HSV_BITS
    reciprocal = torch.where(denominator > 0, (scale * unit / denominator).round(), 0)
    return (numerator * reciprocal + unit / 2).div_(unit).floor_()


def _to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Three `[b s s]` whole numbers in 0..255 -> `[b 3 s s]` RGB; a hue of 255 is a whole turn."""
    sixth = (hue * (6 / HUE_LEVELS_TO_RGB))[:, None] + torch.arange(5, 0, -2, device=hue.device)[
        :, None, None
    ]
    sixth = torch.where(sixth >= 6, sixth - 6, sixth)
    distance = torch.minimum(sixth, 4 - sixth).clamp_(0, 1)  # of each channel from its place of full value
    return (value[:, None] * (1 - (saturation / 255)[:, None] * distance)).round_()


def to_gray(images: Tensor) -> Tensor:
    """Luma in all three channels of `[b 3 s s]` images."""
    return _luma(images).expand_as(images)


def _luma(images: Tensor) -> Tensor:
    """`[b 1 s s]` luma, rounded as OpenCV does."""
    red, green, blue = images.split(1, dim=1)
    total = _LUMA_UNITS[0] * red + _LUMA_UNITS[1] * green + _LUMA_UNITS[2] * blue
    unit = 2.0**_LUMA_BITS
    return (total + unit / 2).div_(unit).floor_()


def _kernels(radii: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """`[b k]` Gaussian kernels of `[b]` radii, all as long as the longest, each cut at its three sigma."""
    reach = np.array([blur_reach(float(radius), side) for radius in radii])
    distance = np.abs(np.arange(-reach.max(initial=0), reach.max(initial=0) + 1))
    sigma = np.maximum(radii[:, None].astype(np.float64), 1e-3)
    weights = np.exp(-0.5 * (distance / sigma) ** 2) * (distance <= reach[:, None])
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def gaussian_blur(images: Tensor, kernels: Tensor) -> Tensor:
    """`[b 3 s s]` images, each with its own of `[b k]` kernels along both axes, mirrored at the border."""
    num_images, channels, height, width = images.shape
    groups = kernels.repeat_interleave(channels, dim=0)[:, None, None]
    planes = F.pad(images, (kernels.shape[1] // 2,) * 4, mode="reflect").flatten(0, 1)[None]
    planes = F.conv2d(planes, groups, groups=num_images * channels)
    planes = F.conv2d(planes, groups.transpose(2, 3), groups=num_images * channels)
    return planes.view(num_images, channels, height, width).round_().clamp_(0, 255)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """`[b 3 s s]` images with `[b]` thresholds."""
    return torch.where(images >= threshold[:, None, None, None], 255 - images, images)
