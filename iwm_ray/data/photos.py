"""`photos_tiny`: ten real colour photographs from two Python packages, cut into small labelled patches.

A demonstration that needs no download. The class of a patch is its photograph; training patches come from the
left part of each photograph and test patches from the rest, with no pixel in common.
"""

import importlib.util
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from iwm_ray.data.decode import DecodeLimits, decode
from iwm_ray.errors import UsageError

PHOTOS_TINY = "photos_tiny"
PATCH_SIDE = 64
"""pixels"""

# The folder's name in the cache: a change of anything below needs a new one.
_VERSION = f"{PHOTOS_TINY}-1"
_PHOTOS = {
    "skimage": (
        *("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/hubble_deep_field.jpg"),
        *("data/ihc.png", "data/motorcycle_left.png", "data/retina.jpg", "data/rocket.jpg"),
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
# Each photograph is cut to 3:2 and parted at 25/33 of its width; the parts are scaled to these sizes, (width,
# height).
_ASPECT = 3 / 2
_PARTS = {"train": (300, 264), "test": (96, 264)}
# Patches of a part, (columns, rows): neighbours overlap by two thirds of their side.
_GRIDS = {"train": (12, 10), "test": (3, 10)}


def photos_tiny(cache: Path) -> tuple[Path, Path]:
    """Makes the patches once; later calls only look whether they are there.

    Args:
        cache: the folder that keeps them.

    Returns:
        Class-folder trees of lossless 64x64 PNGs: 10 x 120 patches for training, 10 x 30 for testing.

    Raises:
        UsageError: scikit-image or scikit-learn is not installed, or the cache cannot be written.
    """
    root = cache.expanduser() / _VERSION
    if not root.is_dir():
        photos = _locate_photos()
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                prefix=".building-", dir=root.parent, ignore_cleanup_errors=True
            ) as staging:
                for photo in photos:
                    _cut(photo, Path(staging))
                os.rename(staging, root)
        except OSError as error:
            if not root.is_dir():  # otherwise another process was faster
                raise UsageError(
                    f"runtime.cache {cache}: {error.strerror}; give --runtime.cache DIR"
                ) from None
    return root / "train", root / "test"


def _locate_photos() -> list[Path]:
    """The photographs' files, without importing the packages (which takes seconds)."""
    files = []
    for package, names in _PHOTOS.items():
        spec = importlib.util.find_spec(package)
        folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
        files += [folder / name if folder else Path(package, name) for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UsageError(
            f"data.path {PHOTOS_TINY}: {', '.join(missing)} not found; "
            "pip install scikit-image scikit-learn, or give --data.path a folder of images"
        )
    return files


def _cut(photo: Path, root: Path) -> None:
    """Writes the patches of one photograph."""
    image = Image.fromarray(decode(photo.read_bytes(), DecodeLimits()))
    width, height = min(image.width, image.height * _ASPECT), min(image.height, image.width / _ASPECT)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    edges = np.round([left, left + width * 25 / 33, left + width]).astype(int).tolist()
    for part, start, end in (("train", *edges[:2]), ("test", *edges[1:])):
        box = (start, round(top), end, round(top + height))
        scaled = image.crop(box).resize(
            _PARTS[part], Image.Resampling.LANCZOS
        )  # crop first: no pixel is shared
        folder = root / part / photo.stem
        folder.mkdir(parents=True)
        for number, (x, y) in enumerate(_corners(part)):
            patch = scaled.crop((x, y, x + PATCH_SIDE, y + PATCH_SIDE))
            patch.save(folder / f"{number:03d}.png", compress_level=1)


def _corners(part: str) -> list[tuple[int, int]]:
    """Upper left corners of a part's patches, evenly spread, row by row."""
    (width, height), (columns, rows) = _PARTS[part], _GRIDS[part]
    xs = np.linspace(0, width - PATCH_SIDE, columns).round().astype(int).tolist()
    ys = np.linspace(0, height - PATCH_SIDE, rows).round().astype(int).tolist()
    return [(x, y) for y in ys for x in xs]
