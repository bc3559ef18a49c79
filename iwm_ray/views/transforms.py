"""The operations that make views, each as three calls: sample (draw), apply (pure), encode (for the action).

Images are uint8 RGB `[h w 3]`. Every operation rounds as Pillow and torchvision do, so that a chain stays
within one level of theirs on average; OpenCV does the arithmetic, since it is 4 to 12 times faster. Where an
operation changes nothing the image itself is returned, not a copy. `views/device.py` holds the same
operations for batches.
"""

import math
from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from iwm_ray.views.actions import ActionField
from iwm_ray.views.draws import Draws, Keys, between
from iwm_ray.views.resize import resize

Image = NDArray[np.uint8]
View = Literal["source", "target"]

LUMA = (0.299, 0.587, 0.114)
"""ITU-R 601-2 weights of red, green and blue"""
HUE_LEVELS_TO_HSV, HUE_LEVELS_TO_RGB = 256, 255
"""OpenCV's steps to one turn of 8-bit hue differ with the direction of the conversion"""
TRUNCATE = -0.5 + 3e-5
"""added before OpenCV rounds to the nearest integer, cuts off the fraction as Pillow does; 3e-5 exceeds the
rounding errors of float32 at 255"""
ORDERS = np.array(list(permutations(range(4))), np.uint8)
"""`[24 4]` all orders of brightness, contrast, saturation, hue; the first is the fixed one"""


def adjust_brightness(image: Image, factor: float) -> Image:
    """Blends with black: 0 is black, 1 the image."""
    return image if factor == 1 else cv2.convertScaleAbs(image, alpha=factor, beta=TRUNCATE)


def adjust_contrast(image: Image, factor: float) -> Image:
    """Blends with the mean of the gray image, rounded as Pillow does: 0 is flat gray, 1 the image."""
    if factor == 1:
        return image
    mean = math.floor(np.dot(cv2.mean(image)[:3], LUMA) + 0.5)
    return cv2.addWeighted(image, factor, image, 0, mean * (1 - factor) + TRUNCATE)


def adjust_saturation(image: Image, factor: float) -> Image:
    """Blends with the gray image: 0 is gray, 1 the image."""
    return image if factor == 1 else cv2.addWeighted(image, factor, to_gray(image), 1 - factor, TRUNCATE)


def shift_hue(image: Image, turns: float) -> Image:
    """Turns the hue circle of the 8-bit HSV image."""
    if turns == 0:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    shifted = np.arange(HUE_LEVELS_TO_HSV, dtype=np.float32) / HUE_LEVELS_TO_HSV + np.float32(turns)
    table = np.rint((shifted - np.floor(shifted)) * HUE_LEVELS_TO_RGB).astype(np.uint8)
    cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, 0), table), hsv, 0)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def to_gray(image: Image) -> Image:
    """Luma in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(image: Image, radius: float) -> Image:
    """Gaussian of sigma `radius` as torchvision's, cut at three sigma and mirrored at the border.

    Differs from Pillow's filter of that name, which approximates the Gaussian by three box filters.
    """
    if radius == 0:
        return image
    kernel = cv2.getGaussianKernel(2 * blur_reach(radius, min(image.shape[:2])) + 1, radius)
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


def blur_reach(radius: float, side: int) -> int:
    """Pixels that a blur sees on either side: three sigma, but at most what one mirror image offers."""
    return min(math.ceil(3 * radius), side - 1)


def solarize(image: Image, threshold: int) -> Image:
    """Inverts the values at or above the threshold."""
    bright = cv2.compare(image, (float(threshold),) * 4, cv2.CMP_GE)
    return cv2.bitwise_xor(image, bright)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue of one view, in a drawn or fixed order (METHOD: step 2)."""

    view: View
    probability: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    order: Literal["random", "fixed"]

    NAMES: ClassVar = ("brightness", "contrast", "saturation", "hue")
    OPERATIONS: ClassVar = (adjust_brightness, adjust_contrast, adjust_saturation, shift_hue)

    @property
    def fields(self) -> tuple[ActionField, ...]:
        """What `encode` returns, column by column."""
        factors = [ActionField(name, "factor", 1.0, getattr(self, name)) for name in self.NAMES[:3]]
        return (*factors, ActionField("hue", "turns", 0.0, self.hue))

    def identity(self, count: int) -> Draws:
        """Columns of `count` samples that stay as they are."""
        columns = {field.name: np.full(count, field.identity, np.float32) for field in self.fields}
        columns |= {"jitter": np.zeros(count, bool), "order": np.repeat(ORDERS[:1], count, axis=0)}
        return {f"{self.view}_{name}": column for name, column in columns.items()}

    def sample(self, keys: Keys) -> Draws:
        """Draws the columns of this view (views/draws.py); identity values where no jitter is applied."""
        uniform = keys.uniforms(self.view, 6)
        jitter = uniform[:, 0] < self.probability
        columns = {"jitter": jitter}
        for place, field in enumerate(self.fields, start=1):
            values = field.identity + between(-field.scale, field.scale, uniform[:, place])
            columns[field.name] = np.where(jitter, values, field.identity).astype(np.float32)
        num_orders = len(ORDERS) if self.order == "random" else 1
        columns["order"] = ORDERS[(uniform[:, 5] * num_orders).astype(int)]
        return {f"{self.view}_{name}": column for name, column in columns.items()}

    def apply(self, image: Image, draws: Draws, i: int) -> Image:
        """The image with row `i` of the draws applied."""
        if not draws[f"{self.view}_jitter"][i]:
            return image
        for operation in draws[f"{self.view}_order"][i]:
            value = float(draws[f"{self.view}_{self.NAMES[operation]}"][i])
            image = self.OPERATIONS[operation](image, value)
        return image

    def encode(self, draws: Draws) -> NDArray[np.float32]:
        """`[b 4]` deviations from the identity, each divided by its strength, in -1..1."""
        return np.stack([field.encode(draws[f"{self.view}_{field.name}"]) for field in self.fields], axis=1)


@dataclass(frozen=True)
class Grayscale:
    """Luma in all channels (METHOD: step 3)."""

    probability: float
    fields: ClassVar = (ActionField("grayscale", "flag", 0.0, 1.0),)

    def identity(self, count: int) -> Draws:
        return {"source_grayscale": np.zeros(count, bool)}

    def sample(self, keys: Keys) -> Draws:
        return {"source_grayscale": keys.uniforms("grayscale", 1)[:, 0] < self.probability}

    def apply(self, image: Image, draws: Draws, i: int) -> Image:
        return to_gray(image) if draws["source_grayscale"][i] else image

    def encode(self, draws: Draws) -> NDArray[np.float32]:
        """`[b 1]` flag."""
        return draws["source_grayscale"].astype(np.float32)[:, None]


@dataclass(frozen=True)
class GaussianBlur:
    """Gaussian blur of a drawn radius; the action tells that it was applied, not how far (METHOD: step 4)."""

    probability: float
    radius: tuple[float, float]
    fields: ClassVar = (ActionField("blur", "flag", 0.0, 1.0),)

    def identity(self, count: int) -> Draws:
        return {"source_blur": np.zeros(count, bool), "source_blur_radius": np.zeros(count, np.float32)}

    def sample(self, keys: Keys) -> Draws:
        uniform = keys.uniforms("blur", 2)
        blur = uniform[:, 0] < self.probability
        radius = np.where(blur, between(*self.radius, uniform[:, 1]), 0).astype(np.float32)
        return {"source_blur": blur, "source_blur_radius": radius}

    def apply(self, image: Image, draws: Draws, i: int) -> Image:
        return (
            gaussian_blur(image, float(draws["source_blur_radius"][i])) if draws["source_blur"][i] else image
        )

    def encode(self, draws: Draws) -> NDArray[np.float32]:
        """`[b 1]` flag."""
        return draws["source_blur"].astype(np.float32)[:, None]


@dataclass(frozen=True)
class Solarize:
    """Inverts bright values (METHOD: step 3)."""

    probability: float
    threshold: int
    fields: ClassVar = (ActionField("solarize", "flag", 0.0, 1.0),)

    def identity(self, count: int) -> Draws:
        threshold = np.full(count, self.threshold, np.uint8)
        return {"source_solarize": np.zeros(count, bool), "source_solarize_threshold": threshold}

    def sample(self, keys: Keys) -> Draws:
        applied = keys.uniforms("solarize", 1)[:, 0] < self.probability
        return self.identity(len(keys)) | {"source_solarize": applied}

    def apply(self, image: Image, draws: Draws, i: int) -> Image:
        threshold = int(draws["source_solarize_threshold"][i])
        return solarize(image, threshold) if draws["source_solarize"][i] else image

    def encode(self, draws: Draws) -> NDArray[np.float32]:
        """`[b 1]` flag."""
        return draws["source_solarize"].astype(np.float32)[:, None]


@dataclass(frozen=True)
class RandomResizedCrop:
    """A box of drawn area and aspect, resized to a square; both views share it, so no action tells of it.

    Sampled as torchvision does: ten tries of area and aspect (log-uniform), else the largest central box
    whose aspect is allowed.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]

    NUM_TRIES: ClassVar = 10

    def identity(self, count: int) -> Draws:
        edges = {"crop_top": 0, "crop_left": 0, "crop_height": 1, "crop_width": 1}
        return {name: np.full(count, edge, np.float32) for name, edge in edges.items()}

    def sample(self, keys: Keys, heights: NDArray[np.int64], widths: NDArray[np.int64]) -> Draws:
        """Draws boxes for images of `[b]` heights and widths, pixels; 0 (not decodable) counts as 1."""
        image_height, image_width = np.maximum(heights, 1), np.maximum(widths, 1)
        uniform = keys.uniforms("crop", 2 * self.NUM_TRIES + 2)
        area = between(*self.scale, uniform[:, : self.NUM_TRIES]) * (image_height * image_width)[:, None]
        low, high = np.log(self.ratio)
        aspect = np.exp(between(low, high, uniform[:, self.NUM_TRIES : -2]))
        height, width = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
        fits = (
            (height > 0) & (height <= image_height[:, None]) & (width > 0) & (width <= image_width[:, None])
        )
        first, rows = fits.argmax(axis=1), np.arange(len(keys))
        drawn, (central_height, central_width) = fits.any(axis=1), self._central(image_height, image_width)
        height = np.where(drawn, height[rows, first], central_height)
        width = np.where(drawn, width[rows, first], central_width)
        top = np.where(drawn, uniform[:, -2] * (image_height - height + 1), (image_height - height) / 2)
        left = np.where(drawn, uniform[:, -1] * (image_width - width + 1), (image_width - width) / 2)
        return {
            "crop_top": (np.floor(top) / image_height).astype(np.float32),
            "crop_left": (np.floor(left) / image_width).astype(np.float32),
            "crop_height": (height / image_height).astype(np.float32),
            "crop_width": (width / image_width).astype(np.float32),
        }

    def _central(self, height: NDArray, width: NDArray) -> tuple[NDArray, NDArray]:
        """Size of the largest box whose aspect is allowed."""
        narrowest, widest = self.ratio
        box_width = np.where(width / height > widest, np.rint(height * widest), width)
        box_height = np.where(width / height < narrowest, np.rint(width / narrowest), height)
        return np.maximum(box_height, 1), np.maximum(box_width, 1)

    def box(self, draws: Draws, i: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) in pixels of an image of that size."""
        edges = ("crop_top", "crop_left", "crop_height", "crop_width")
        top, left, *size = (
            round(float(draws[edge][i]) * side) for edge, side in zip(edges, (height, width) * 2, strict=True)
        )
        return top, left, max(size[0], 1), max(size[1], 1)

    def apply(self, image: Image, draws: Draws, i: int) -> Image:
        """`[h w 3]` -> `[size size 3]`."""
        top, left, height, width = self.box(draws, i, *image.shape[:2])
        return resize(image[top : top + height, left : left + width], self.size)


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirrors left to right; both views share it, so no action tells of it."""

    probability: float

    def identity(self, count: int) -> Draws:
        return {"flip": np.zeros(count, bool)}

    def sample(self, keys: Keys) -> Draws:
        return {"flip": keys.uniforms("flip", 1)[:, 0] < self.probability}

    def apply(self, image: Image, draws: Draws, i: int) -> Image:
        return cv2.flip(image, 1) if draws["flip"][i] else image
