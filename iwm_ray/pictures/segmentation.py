"""Segmentations side by side: image, truth and what each network predicts."""

from collections.abc import Mapping, Sequence

import numpy as np
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
_FIRST = (INK, ORANGE, SKY, GREEN, _YELLOW, BLUE, RED, PURPLE)
_LEVELS = 13  # of each of red, green and blue, from which more colours are chosen
_DARKEST = 0.45  # lightness in 0..1; the background's is 0.25
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_CELL, _NAME = 1.5, 1.1  # inches: a picture, and a name in the legend


def class_colours(count: int) -> NDArray[np.uint8]:
    """`[count 3]` a colour for each class, the same however many there are; the first, mostly the background, is dark.

    After the first eight, each is the one that differs most from all before it and from white, which ignored pixels are: so
    classes whose numbers are close look different.
    """
    chosen = np.array([to_rgb(name) for name in _FIRST])
    levels = np.linspace(0, 1, _LEVELS)
    candidates = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    candidates = candidates[_perceived(candidates)[:, 0] > _DARKEST]
    places = _perceived(candidates)
    nearest = np.linalg.norm(places[:, None] - _perceived(np.vstack([chosen, np.ones(3)])), axis=2).min(1)
    while len(chosen) < count:
        best = int(nearest.argmax())
        chosen = np.vstack([chosen, candidates[best]])
        nearest = np.minimum(nearest, np.linalg.norm(places - places[best], axis=1))
    return np.round(255 * chosen[:count]).astype(np.uint8)


def _perceived(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[k 3]` sRGB in 0..1 -> `[k 3]` OKLab (Ottosson 2020), where distances are about those that one sees."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_CONES.T) @ _TO_LAB.T


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
