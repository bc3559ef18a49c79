"""Which transforms make the source and the target view of an image, and the action between them."""

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from iwm_ray.config import ViewsConfig
from iwm_ray.views.actions import ActionField
from iwm_ray.views.draws import Draws, Keys
from iwm_ray.views.transforms import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Image,
    RandomResizedCrop,
    Solarize,
    View,
)

_JITTER_COLUMNS = (
    ("jitter", 1, np.bool_),
    ("brightness", 1, np.float32),
    ("contrast", 1, np.float32),
    ("saturation", 1, np.float32),
    ("hue", 1, np.float32),
    ("order", 4, np.uint8),
)
_PACKED_COLUMNS = (
    *((f"target_{name}", width, dtype) for name, width, dtype in _JITTER_COLUMNS),
    *((f"source_{name}", width, dtype) for name, width, dtype in _JITTER_COLUMNS),
    ("source_grayscale", 1, np.bool_),
    ("source_blur", 1, np.bool_),
    ("source_blur_radius", 1, np.float32),
    ("source_solarize", 1, np.bool_),
    ("source_solarize_threshold", 1, np.uint8),
)


@dataclass(frozen=True)
class ViewPolicy:
    """The view policy of a run (IWM, section 3; METHOD: steps 1 to 4).

    Crop and flip make the shared crop; the target view is the jittered crop; the source view is `source_base`
    with a jitter of its own, then grayscale, blur and solarize in that (BYOL) order.

    The action is what leads from the source to the target view. Its first four components are the target's
    jitter parameters minus the source's, each divided by its strength: -2..2. With `source_base="target"` the
    source is made from the target view, so nothing of the target's own jitter lies between the two, and the
    way back is the source's jitter undone: identity minus the source's parameters, -1..1. The flags that
    follow say what was done to the source view; they are not negated. The null action, where nothing differs,
    is exactly zero.
    """

    crop_box: RandomResizedCrop
    flip: HorizontalFlip
    target_jitter: ColorJitter
    source_jitter: ColorJitter
    destructive: tuple[Grayscale, GaussianBlur, Solarize]
    source_base: Literal["crop", "target"]

    @classmethod
    def from_config(cls, config: ViewsConfig) -> Self:
        """The policy that the configuration describes; any valid `ViewsConfig` makes one."""

        def jitter(view: View) -> ColorJitter:
            strengths = (config.brightness, config.contrast, config.saturation, config.hue)
            return ColorJitter(view, config.jitter_probability, *strengths, config.jitter_order)

        return cls(
            crop_box=RandomResizedCrop(config.image_size, config.crop_scale, config.crop_ratio),
            flip=HorizontalFlip(config.flip_probability),
            target_jitter=jitter("target"),
            source_jitter=jitter("source"),
            destructive=(
                Grayscale(config.grayscale_probability),
                GaussianBlur(config.blur_probability, config.blur_radius),
                Solarize(config.solarize_probability, config.solarize_threshold),
            ),
            source_base=config.source_base,
        )

    @property
    def schema(self) -> tuple[ActionField, ...]:
        """Names, units, identities and scales of the action's components, in order."""
        flags = (field for transform in self.destructive for field in transform.fields)
        return (*self.target_jitter.fields, *flags)

    @property
    def action_dim(self) -> int:
        """Components of the action."""
        return len(self.schema)

    def draw(
        self,
        seed: int,
        epochs: NDArray[np.int64],
        samples: NDArray[np.int64],
        heights: NDArray[np.int64],
        widths: NDArray[np.int64],
    ) -> Draws:
        """Draws everything that the two views need.

        Args:
            seed: the run's seed.
            epochs: `[b]` pass over the data of each row.
            samples: `[b]` sample numbers.
            heights: `[b]` of the decoded images, pixels; 0 for an image that could not be decoded.
            widths: `[b]` likewise.

        Returns:
            the table described in views/draws.py; a row depends on nothing but its own arguments.
        """
        keys = Keys(seed, epochs, samples)
        draws = {"image_height": heights.astype(np.int32), "image_width": widths.astype(np.int32)}
        draws |= self.crop_box.sample(keys, heights, widths)
        for transform in (self.flip, self.target_jitter, self.source_jitter, *self.destructive):
            draws |= transform.sample(keys)
        return draws

    def identity(self, count: int) -> Draws:
        """Draws that change nothing: the whole image, both views equal to it, the null action."""
        draws: Draws = {}
        for transform in (
            self.crop_box,
            self.flip,
            self.target_jitter,
            self.source_jitter,
            *self.destructive,
        ):
            draws |= transform.identity(count)
        return draws

    def crop(self, image: Image, draws: Draws, i: int) -> Image:
        """`[h w 3]` decoded image -> `[s s 3]` shared crop of row `i`, flipped where the row says so."""
        return self.flip.apply(self.crop_box.apply(image, draws, i), draws, i)

    def views(self, crop: Image, draws: Draws, i: int) -> tuple[Image, Image]:
        """`[s s 3]` shared crop -> (source, target), both `[s s 3]`; an unchanged view is `crop` itself."""
        target = self.target_jitter.apply(crop, draws, i)
        source = self.source_jitter.apply(crop if self.source_base == "crop" else target, draws, i)
        for transform in self.destructive:
            source = transform.apply(source, draws, i)
        return source, target

    def encode(self, draws: Draws) -> NDArray[np.float32]:
        """`[b a]` float32 actions from source to target (see the class), columns as in `schema`."""
        jitter = -self.source_jitter.encode(draws) + 0.0  # + 0.0: no negative zeros
        if self.source_base == "crop":
            jitter = self.target_jitter.encode(draws) + jitter
        return np.concatenate([jitter, *(transform.encode(draws) for transform in self.destructive)], axis=1)

    def pack(self, draws: Draws) -> NDArray[np.float32]:
        """`[b p]` float32: the columns that views/device.py needs, in one array to ship."""
        columns = [draws[name].reshape(-1, width) for name, width, _ in _PACKED_COLUMNS]
        return np.concatenate(columns, axis=1, dtype=np.float32)

    def unpack(self, packed: NDArray[np.float32]) -> Draws:
        """The draws that `pack` packed, with their types, value for value."""
        stops = np.cumsum([width for _, width, _ in _PACKED_COLUMNS])[:-1]
        parts = np.split(packed, stops, axis=1)
        return {
            name: (part if width > 1 else part[:, 0]).astype(dtype)
            for (name, width, dtype), part in zip(_PACKED_COLUMNS, parts, strict=True)
        }
