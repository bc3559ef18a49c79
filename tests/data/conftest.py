"""Small images and data sets that the tests of this folder share."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray


@pytest.fixture(scope="session")
def photo() -> NDArray[np.uint8]:
    """`[40 56 3]`: smooth colours with no symmetry, so that every turn and mirroring looks different."""
    y, x = np.mgrid[0:40, 0:56]
    return np.stack([x * 4, y * 6, 255 - x * 2 - y * 3], axis=-1).astype(np.uint8)


@pytest.fixture(scope="session")
def jpeg(photo: NDArray[np.uint8]) -> bytes:
    """A plain JPEG of the photo."""
    return simplejpeg.encode_jpeg(photo, quality=95)


@pytest.fixture
def tree(tmp_path: Path, jpeg: bytes) -> Path:
    """Class folders cat (3 images) and dog (2, one of them nested)."""
    for name in ("cat/a.jpg", "cat/b.jpeg", "cat/c.JPG", "dog/a.jpg", "dog/puppies/b.jpg"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            jpeg + name.encode()
        )  # the decoder ignores bytes behind the image; tests tell them apart
    return tmp_path / "tree"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of larger data beside the repository; without it the test is skipped."""
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the shared data beside the repository")
    return folder
