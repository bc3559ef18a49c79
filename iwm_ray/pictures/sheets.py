"""Sheets of samples: what a training step sees of an image."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from iwm_ray.pictures.style import (
    BLUE,
    DPI,
    GREY,
    HEADING,
    INK,
    ORANGE,
    SMALL,
    TITLE,
    show_image,
)
from iwm_ray.pictures.words import amount
from iwm_ray.views.actions import ActionField
from iwm_ray.views.draws import Draws
from iwm_ray.views.masks import Masks
from iwm_ray.views.policy import ViewPolicy

_SIDE, _NAMES, _BARS, _GAP = (
    1.7,
    0.95,
    1.35,
    0.14,
)  # inches: an image, names and bars of the action, between columns
_ROW_GAP, _HEAD, _FOOT = 0.16, 0.78, 0.44  # inches: between rows, above and below all rows
_EDGE = 0.22  # inches: at the sides
_COLUMNS = ("shared crop", "source view", "context (seen)", "targets (predicted)", "action")
_COVERED = 226  # grey of a patch that is not shown
_FADED = 0.78  # share of white in patches that are not predicted
_REACH = 2.0  # coded actions lie in -2..2


def views_sheet(
    crops: NDArray[np.uint8],
    draws: Draws,
    masks: Masks,
    policy: ViewPolicy,
    grid: tuple[int, int],
    title: str = "Views, masks and actions",
) -> Figure:
    """Draws a row for each sample: shared crop, source view, context patches, predicted patches and the action.

    Args:
        crops: `[k s s 3]` uint8 shared crops; a row each, six or so fit a page.
        draws: k rows.
        masks: k rows, of which the positions count.
        policy: makes the views and codes the action.
        grid: (rows, columns) of patches.
        title: above the rows.
    """
    actions = policy.encode(draws)
    width = 2 * _EDGE + 4 * _SIDE + _NAMES + _BARS + 5 * _GAP + 0.5
    figure = Figure(figsize=(width, _HEAD + len(crops) * (_SIDE + _ROW_GAP) + _FOOT), dpi=DPI)
    height = figure.get_figheight()
    figure.text(
        _EDGE / width, 1 - 0.17 / height, title, fontsize=TITLE, fontweight="bold", color=INK, va="top"
    )
    for row, crop in enumerate(crops):
        source, target = policy.views(crop, draws, row)
        predicted = predicted_patches(masks.target_idx[row], grid)
        axes = _row_axes(figure, row)
        if row == 0:
            for column, name in zip(axes, _COLUMNS, strict=True):
                column.set_title(name, fontsize=HEADING, color=INK, pad=6)
        show_image(axes[0], crop)
        show_image(axes[1], source)
        _show_patches(axes[2], np.where(_to_pixels(predicted, source), np.uint8(_COVERED), source), predicted)
        faded = (_FADED * 255 + (1 - _FADED) * target).astype(np.uint8)
        _show_patches(axes[3], np.where(_to_pixels(predicted, target), target, faded), predicted)
        _draw_action(axes[4], actions[row], policy.schema)
    note = "Action: from source to target, in strengths of the jitter (bars) and in physical units (numbers)."
    figure.text(_EDGE / width, 0.16 / height, note, fontsize=SMALL, color=GREY, va="bottom")
    return figure


def predicted_patches(target_idx: NDArray[np.integer], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """`[t]` positions -> `[rows columns]`, true where a patch is predicted."""
    patches = np.zeros(grid, bool)
    patches.reshape(-1)[target_idx] = True
    return patches


def _row_axes(figure: Figure, row: int) -> list[Axes]:
    """Four images and the bars; measures in inches, so that rows look the same however many there are."""
    width, height = figure.get_size_inches()
    bottom = height - _HEAD - (row + 1) * (_SIDE + _ROW_GAP) + _ROW_GAP
    axes, left = [], _EDGE
    for number in range(len(_COLUMNS)):
        last = number == len(_COLUMNS) - 1
        left += _NAMES if last else 0
        column = _BARS if last else _SIDE
        axes.append(figure.add_axes((left / width, bottom / height, column / width, _SIDE / height)))
        left += column + _GAP
    return axes


def _to_pixels(patches: NDArray[np.bool_], image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """`[rows columns]` -> `[h w 1]`."""
    height, width = image.shape[0] // patches.shape[0], image.shape[1] // patches.shape[1]
    return patches.repeat(height, axis=0).repeat(width, axis=1)[..., None]


def _show_patches(axes: Axes, image: NDArray[np.uint8], predicted: NDArray[np.bool_]) -> None:
    """The image with a line around the predicted patches."""
    show_image(axes, image)
    side = image.shape[0] / predicted.shape[0]
    lines = [[(x * side - 0.5, y * side - 0.5) for x, y in edge] for edge in outline(predicted)]
    axes.add_collection(LineCollection(lines, colors=ORANGE, linewidths=1.6, capstyle="projecting"))


def outline(patches: NDArray[np.bool_]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The edges, as ((x, y), (x, y)) in patches, between patches that are and patches that are not."""
    padded = np.pad(patches, 1)
    down = [((x - 1, y), (x, y)) for y, x in np.argwhere(padded[1:] != padded[:-1])]
    across = [((x, y - 1), (x, y)) for y, x in np.argwhere(padded[:, 1:] != padded[:, :-1])]
    return down + across


def _draw_action(axes: Axes, action: NDArray[np.float32], schema: Sequence[ActionField]) -> None:
    places = np.arange(len(schema))
    axes.barh(places, action, height=0.55, color=BLUE)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_xlim(-_REACH, _REACH)
    axes.set_ylim(len(schema) - 0.5, -0.5)
    axes.set_yticks(places, [field.name for field in schema])
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=INK)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.set_facecolor("none")
    for place, (value, field) in enumerate(zip(action, schema, strict=True)):
        words = amount(float(value), field) if value or field.unit == "flag" else "0"
        axes.text(_REACH * 1.05, place, words, fontsize=SMALL, color=INK if value else GREY, va="center")
