"""How the pictures look: one palette, one set of text sizes, one way to show pixels."""

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

# Okabe and Ito's palette: told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#222222", "#6E6E6E", "#D9D9D9"

TITLE, HEADING, TEXT, SMALL = 13, 10, 9, 8  # points
DPI = 150


def show_image(axes: Axes, image: NDArray[np.uint8], frame: str = PALE, frame_width: float = 0.8) -> None:
    """Shows uint8 `[h w 3]`: pixels stay pixels where they are enlarged, and are smoothed where they are shrunk."""
    axes.imshow(
        image, interpolation="nearest" if len(image) < 128 else "antialiased", interpolation_stage="rgba"
    )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(frame)
        spine.set_linewidth(frame_width)
