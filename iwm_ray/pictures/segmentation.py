"""Segmentations side by side: image, truth and what each network predicts."""

from collections.abc import Mapping, Sequence

import numpy as np
from colorcet import glasbey_bw_minc_20_minl_30
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from iwm_ray.pictures.style import (
    BLUE,
    DPI,
    GREEN,
    HEADING,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    SMALL,
    TITLE,
    show_image,
)

_YELLOW = "#F0E442"
# All of Okabe and Ito's palette; black is for the background, as mostly the first class is.
_FEW = (INK, ORANGE, SKY, GREEN, _YELLOW, BLUE, RED, PURPLE)
_MANY = (INK, *glasbey_bw_minc_20_minl_30)  # 256 that differ from each other, and from black and white
_CELL, _NAME = 1.5, 1.1  # inches: a picture, and a name in the legend


def class_colours(count: int) -> NDArray[np.uint8]:
    """`[count 3]` a colour for each class, at most 257; the first, mostly the background, is dark."""
    names = _FEW if count <= len(_FEW) else _MANY
    return np.array([[round(255 * part) for part in to_rgb(name)] for name in names[:count]], np.uint8)


def segmentation_sheet(
    images: NDArray[np.uint8],
    truth: NDArray[np.int64] | None,
    predicted: Mapping[str, NDArray[np.int64]],
    class_names: Sequence[str],
    title: str,
) -> Figure:
    """One row for each image.

    Args:
        images: `[k s s 3]`.
        truth: `[k s s]` classes; values beyond the classes are ignored pixels, drawn white. None: nobody knows it.
        predicted: heading -> `[k s s]` classes.
        class_names: of the classes; the legend names those that are seen.
        title: above the rows.
    """
    shown = ({} if truth is None else {"truth": truth}) | dict(predicted)
    columns = {"image": images} | {
        heading: _coloured(classes, len(class_names)) for heading, classes in shown.items()
    }
    seen = sorted(
        {int(number) for each in shown.values() for number in np.unique(each) if number < len(class_names)}
    )
    width = max(6.5, _CELL * len(columns))
    names_a_line = max(1, min(len(seen), int(width / _NAME)))
    lines = -(-len(seen) // names_a_line)
    size = (width, _CELL * len(images) + 0.8 + 0.22 * lines)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=TITLE, color=INK)
    grid = figure.subplots(len(images), len(columns), squeeze=False)
    for column, (heading, pictures) in enumerate(columns.items()):
        grid[0, column].set_title(heading, fontsize=HEADING, color=INK)
        for row, picture in enumerate(pictures):
            show_image(grid[row, column], picture)
    colours = class_colours(len(class_names)) / 255
    handles = [Patch(color=colours[number], label=class_names[number]) for number in seen]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=names_a_line,
        fontsize=SMALL,
        frameon=False,
    )
    return figure


def _coloured(classes: NDArray[np.int64], count: int) -> NDArray[np.uint8]:
    """`[k s s]` -> `[k s s 3]`."""
    table = np.concatenate([class_colours(count), np.full((1, 3), 255, np.uint8)])
    return table[np.minimum(classes, count)]
