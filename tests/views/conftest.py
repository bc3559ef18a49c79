"""Real photographs: the four colour ones that scikit-image installs, and the shared ones where they are."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
SHARED = Path(__file__).parents[3] / "shared" / "data" / "photos"


@pytest.fixture(scope="session")
def photographs() -> list[np.ndarray]:
    """uint8 `[h w 3]`, 300 x 451 to 512 x 512 pixels; 40 more of about 375 x 500 with the shared data."""
    installed = [files("skimage") / "data" / name for name in NAMES]
    shared = sorted(SHARED.glob("*/*"))[::8][:40]
    return [np.asarray(Image.open(str(path)).convert("RGB")) for path in (*installed, *shared)]


@pytest.fixture(scope="session")
def crops(photographs: list[np.ndarray]) -> list[np.ndarray]:
    """The photographs at 160 x 160 pixels."""
    return [
        np.asarray(Image.fromarray(photo).resize((160, 160), Image.Resampling.BILINEAR))
        for photo in photographs
    ]
