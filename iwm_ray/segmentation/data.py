"""Pairs of image and mask: found by their names, read, cropped and mirrored together."""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from iwm_ray.config import Config
from iwm_ray.data.decode import DecodeLimits, EncodedImage, Undecodable
from iwm_ray.data.index import Index
from iwm_ray.data.plan import Plan, permute
from iwm_ray.data.quarantine import Quarantine, decode_noting
from iwm_ray.data.read import Reader
from iwm_ray.data.splits import refuse_shared_images, refuse_unreadable
from iwm_ray.errors import UsageError
from iwm_ray.feed import Columns
from iwm_ray.finetuning.data import NUM_TRIED, Tokens
from iwm_ray.randomness import uniforms
from iwm_ray.segmentation.settings import SegmentAugmentConfig, SegmentConfig
from iwm_ray.views.resize import resize

_READ_AT_ONCE = 256
IGNORED = 255
"""the class of pixels that are neither trained on nor judged"""

# The classes of the Clothing Co-Parsing data, from 0: null to 58: wedges.
CCP8: dict[str, tuple[int, ...]] = {
    "background": (0,),
    "skin": (41,),
    "hair": (19,),
    "top": (4, 5, 6, 8, 10, 11, 13, 22, 23, 24, 26, 38, 46, 48, 49, 51, 54, 55),
    "bottom": (25, 27, 30, 31, 40, 42, 45, 53),
    "dress": (14, 35, 50),
    "shoes": (7, 12, 16, 21, 28, 32, 36, 39, 43, 44, 58),
    "accessories": (1, 2, 3, 9, 15, 17, 18, 20, 29, 33, 34, 37, 47, 52, 56, 57),
}


@dataclass(frozen=True)
class Classes:
    """From the values of masks to classes."""

    names: tuple[str, ...]
    table: tuple[int, ...]
    """256 numbers: the class of each value, or IGNORED"""

    @classmethod
    def of_groups(cls, groups: dict[str, tuple[int, ...]]) -> "Classes":
        """Each group of values is one class; the other values are IGNORED."""
        table = [IGNORED] * 256
        for number, values in enumerate(groups.values()):
            for value in values:
                table[value] = number
        return cls(tuple(groups), tuple(table))

    @cached_property
    def lookup(self) -> NDArray[np.uint8]:
        """`[256]`."""
        return np.array(self.table, np.uint8)


@dataclass(frozen=True)
class Pairs:
    """Images with their masks."""

    index: Index
    masks: Path
    samples: NDArray[np.int64]
    """`[k]` sample numbers in the index"""
    classes: Classes
    size: int
    """side of what is read, pixels"""
    limits: DecodeLimits
    augment: SegmentAugmentConfig | None = None
    """None: the whole image"""
    masks_hash: str = ""
    """names the bytes of the masks"""
    quarantine: Quarantine | None = None
    """where images that cannot be decoded are noted; None: nowhere"""

    def __len__(self) -> int:
        return len(self.samples)

    def read(
        self, places: NDArray[np.int64], epochs: NDArray[np.int64], seed: int
    ) -> tuple[Tensor, Tensor, NDArray[np.bool_]]:
        """Some pairs, cropped and mirrored by draws of that seed and epoch.

        Returns:
            `[b 3 s s]` uint8 images, `[b s s]` uint8 classes (IGNORED: none), and `[b]` whether the image can be
            decoded: if not it is black, and all of its pixels are IGNORED.
        """
        samples, size = self.samples[places], self.size
        images = np.zeros((len(places), size, size, 3), np.uint8)
        masks = np.full((len(places), size, size), IGNORED, np.uint8)
        found = np.zeros(len(places), np.bool_)
        for i, image in decode_noting(self._reader, self.index, samples, self.limits, self.quarantine):
            mask = self.classes.lookup[read_mask(self.mask_path(int(samples[i])), image.shape[:2])]
            draws = uniforms(seed, int(epochs[i]), samples[i : i + 1], "segment", 4)[0]
            images[i], masks[i] = cut(image, mask, size, self.augment, draws)
            found[i] = True
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(masks), found

    def read_masks(
        self, places: NDArray[np.int64], epochs: NDArray[np.int64], seed: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The masks alone, as `read` gives them where `crop_area` is 1.

        Returns:
            `[b s s]` classes, and `[b]` whether image and mask are mirrored.
        """
        masks = np.empty((len(places), self.size, self.size), np.uint8)
        flipped = np.zeros(len(places), np.bool_)
        for i, sample in enumerate(self.samples[places]):
            mask = self.classes.lookup[read_mask(self.mask_path(int(sample)))]
            masks[i] = nearest(mask, self.size, self.size)
            if self.augment is not None:
                draws = uniforms(seed, int(epochs[i]), np.array([sample]), "segment", 4)[0]
                flipped[i] = draws[3] < self.augment.flip_probability
        masks[flipped] = masks[flipped, :, ::-1]
        return masks, flipped

    def part(self, start: int, stop: int) -> "Pairs":
        """Pairs `start` to `stop` - 1 alone."""
        return replace(self, samples=self.samples[start:stop])

    def mask_path(self, sample: int) -> Path:
        """The mask of an image: the same name below the folder of masks, with .png."""
        return (self.masks / self.index.row_id(sample)).with_suffix(".png")

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.index)


@dataclass(frozen=True)
class PairSteps:
    """The rows of every step of an arm: a function of the seed (see feed.Rows)."""

    pairs: Pairs
    batch_size: int
    seed: int
    tokens: Tokens | None = None
    """None: images are read"""

    @property
    def row_bytes(self) -> int:
        """Bytes of an image and its mask."""
        return 4 * self.pairs.size**2

    @property
    def view_bytes(self) -> int:
        """Bytes of an image."""
        return 3 * self.pairs.size**2

    def rows(self, counters: NDArray[np.int64]) -> Columns:
        """`[b]` counters -> `counter [b]`, `inputs [b 3 s s]` or `[b n d]` float32, `labels [b s s]` (see Pairs.read)."""
        plan = Plan(self.seed, len(self.pairs), self.batch_size)
        places, epochs = plan.samples(counters), plan.locate(counters)[0]
        if self.tokens is not None:
            masks, flipped = self.pairs.read_masks(places, epochs, self.seed)
            inputs, readable = self.tokens.read(self.pairs.samples[places], flipped)
            masks[~readable] = IGNORED
            return {"counter": counters, "inputs": inputs, "labels": masks}
        images, classes, _ = self.pairs.read(places, epochs, self.seed)
        return {"counter": counters, "inputs": images.numpy(), "labels": classes.numpy()}


def cut(
    image: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    size: int,
    augment: SegmentAugmentConfig | None,
    draws: NDArray[np.float64],
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A window of an image with its aspect, resized to a square without aliasing, and of its mask, whose values are
    never mixed.

    Args:
        image: `[h w 3]`.
        mask: `[h w]`.
        size: side of the results, pixels.
        augment: None: the whole image.
        draws: `[4]` in 0..1: area, row, column, flip.
    """
    if augment is None:
        return resize(image, size), nearest(mask, size, size)
    scale = float(augment.crop_area + draws[0] * (1 - augment.crop_area)) ** 0.5
    height, width = (max(1, round(side * scale)) for side in mask.shape)
    top = int(draws[1] * (mask.shape[0] - height + 1))
    left = int(draws[2] * (mask.shape[1] - width + 1))
    window = np.s_[top : top + height, left : left + width]
    image, mask = resize(image[window], size), nearest(mask[window], size, size)
    if draws[3] < augment.flip_probability:
        return np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])
    return image, mask


def nearest(mask: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """`[h w]` -> `[height width]`: the value under each new pixel's centre."""
    places = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for new, old in zip((height, width), mask.shape, strict=True)
    )
    return mask[np.ix_(*places)]


def mask_hash(path: Path) -> bytes:
    """Names the bytes of a mask.

    Raises:
        UsageError: it cannot be read.
    """
    with _reading(path):
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()


def mask_size(path: Path) -> tuple[int, int]:
    """Width and height of a mask, pixels, from its header.

    Raises:
        UsageError: not a picture with one value a pixel.
    """
    with _reading(path), Image.open(path) as found:
        _check_mode(path, found)
        return found.size


def _check_mode(path: Path, found: Image.Image) -> None:
    if found.mode not in ("L", "P", "1"):
        raise UsageError(f"mask {path}: has mode {found.mode}; give an 8-bit PNG whose values are classes")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnidentifiedImageError) as error:
        raise UsageError(f"mask {path}: cannot be read ({error}); give an 8-bit PNG") from None


def read_mask(path: Path, shape: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """`[h w]` uint8 values of an index PNG.

    Raises:
        UsageError: not a picture with one value a pixel, or not of the image's shape (rows, columns).
    """
    with _reading(path), Image.open(io.BytesIO(path.read_bytes())) as found:
        _check_mode(path, found)
        mask = np.array(found, np.uint8)
    if shape is not None and mask.shape != tuple(shape):
        raise UsageError(
            f"mask {path}: is {mask.shape}, its image {tuple(shape)}; give masks of the same size"
        )
    return mask


def open_pairs(config: SegmentConfig, run: Config, size: int, cache: Path) -> tuple[Pairs, Pairs]:
    """Training and test pairs.

    Raises:
        UsageError: folders or classes that are not there, images without masks or with masks of another size, masks
            without classes, test images that are trained on.
    """
    data = config.data
    for name in ("path", "masks", "test_path", "test_masks"):
        if not getattr(data, name):
            raise UsageError(f"--data.{name.replace('_', '-')} is missing: give a folder")
    train = _pairs(run, data.path, "masks", data.masks, data.num_train, size, cache)
    test = _pairs(run, data.test_path, "test-masks", data.test_masks, data.num_test, size, cache)
    words = f"--data.test-path {data.test_path}"
    refuse_shared_images(words, train.index, train.samples, test.index, test.samples)
    classes = open_classes(data.classes, data.ignore, train)
    train, test = (
        _checked(replace(pairs, classes=classes), setting)
        for pairs, setting in ((train, "masks"), (test, "test-masks"))
    )
    _refuse_few_classes(train, "masks", 2, data.ignore)
    _refuse_few_classes(test, "test-masks", 1, data.ignore)
    return train, test


def _checked(pairs: Pairs, setting: str) -> Pairs:
    """The pairs, with the hash of their masks; every mask must have the size of its image.

    Raises:
        UsageError: a mask is of another size, or no picture with one value a pixel.
    """
    found = hashlib.blake2b(digest_size=8)
    for first in range(0, len(pairs), _READ_AT_ONCE):
        samples = pairs.samples[first : first + _READ_AT_ONCE]
        for sample, data in zip(map(int, samples), Reader(pairs.index).read_many(samples), strict=True):
            path = pairs.mask_path(sample)
            found.update(mask_hash(path))
            with suppress(Undecodable):
                if isinstance(data, Undecodable):
                    raise data
                image = EncodedImage.open(data, pairs.limits)
                width, height = mask_size(path)
                if (width, height) != (image.width, image.height):
                    raise UsageError(
                        f"--data.{setting} {path}: the mask is {width} x {height} pixels, its image "
                        f"{pairs.index.path(sample)} {image.width} x {image.height}; make the mask as large as the image"
                    )
    return replace(pairs, masks_hash=found.hexdigest())


def _refuse_few_classes(pairs: Pairs, setting: str, fewest: int, ignore: int) -> None:
    """Raises UsageError where the masks hold fewer classes; reads them only until there are enough."""
    values: set[int] = set()
    classes: set[int] = set()
    for sample in map(int, pairs.samples):
        values |= set(np.unique(read_mask(pairs.mask_path(sample))).tolist())
        classes = {pairs.classes.table[value] for value in values} - {IGNORED}
        if len(classes) >= fewest:
            return
    ignored = f"; pixels of value {ignore} are ignored, --data.ignore -1 makes them count"
    raise UsageError(
        f"--data.{setting} {pairs.masks}: pixels of {len(classes)} classes; segmentation needs "
        f"{'two or more to train on' if fewest == 2 else 'one or more to judge by'}, look at --data.classes"
        + ignored
        * (ignore in values)
    )


def _pairs(run: Config, path: str, setting: str, masks: str, count: int, size: int, cache: Path) -> Pairs:
    index = Index.open(run.data.model_copy(update={"path": path}), path, cache)
    folder = Path(masks).expanduser().absolute()
    if not folder.is_dir():
        raise UsageError(f"--data.{setting} {masks}: no such folder; give the folder of the images' masks")
    chosen = permute(0, 0, np.arange(len(index)), len(index))[: count or len(index)]
    nothing = Classes((), ())
    pairs = Pairs(index, folder, chosen, nothing, size, DecodeLimits.from_config(run.data))
    where = f"--data.{'path' if setting == 'masks' else 'test-path'} {path}"
    refuse_unreadable(where, index, chosen[:NUM_TRIED], pairs.limits)
    missing = [sample for sample in map(int, chosen) if not pairs.mask_path(sample).is_file()]
    if missing:
        raise UsageError(
            f"--data.{setting} {masks}: {len(missing)} of {len(chosen)} images have no mask there, such as "
            f"{pairs.mask_path(missing[0])}; add them or remove the images"
        )
    return pairs


def open_classes(words: str, ignore: int, train: Pairs) -> Classes:
    """The classes that `data.classes` names.

    Raises:
        UsageError: no such file, or not as the setting's help says; a class whose pixels are ignored.
    """
    if not words:
        values = {
            int(value)
            for sample in train.samples
            for value in np.unique(read_mask(train.mask_path(int(sample))))
        }
        return Classes.of_groups({str(value): (value,) for value in sorted(values - {ignore})})
    groups = CCP8 if words == "ccp8" else _read_groups(words)
    for name, named in groups.items():
        if ignore in named:
            raise UsageError(
                f"--data.ignore {ignore}: is a value of the class {name!r} of --data.classes {words}; give another value, "
                "or none: --data.ignore -1"
            )
    return Classes.of_groups(groups)


def _read_groups(words: str) -> dict[str, tuple[int, ...]]:
    """The values of each class, from a file."""
    rows: list[tuple[str, tuple[int, ...]]]
    try:
        text = Path(words).expanduser().read_text()
        if words.endswith(".csv"):
            rows = [(row["name"], (int(row["index"]),)) for row in csv.DictReader(io.StringIO(text))]
        else:
            found = json.loads(text, object_pairs_hook=list)
            rows = [(str(name), tuple(map(int, values))) for name, values in found]
    except KeyError as error:
        raise UsageError(
            f"--data.classes {words}: no column {error}; its first line must name the columns index and name"
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--data.classes {words}: not readable ({error}); give a CSV file with index and name, a JSON file of "
            "{name: [values]}, or ccp8"
        ) from None
    for name, values in rows:
        for value in values:
            if not 0 <= value < 256:
                raise UsageError(
                    f"--data.classes {words}: the class {name!r} has the value {value}; values of masks are 0 to 255"
                )
    everything = [value for _, values in rows for value in values]
    for what, known in (("name", [name for name, _ in rows]), ("value", everything)):
        twice = [each for each, count in Counter(known).items() if count > 1]
        if twice:
            raise UsageError(
                f"--data.classes {words}: the {what} {twice[0]!r} stands there twice; give each once (several values of "
                "one class: a JSON file of {name: [values]})"
            )
    return dict(rows)
