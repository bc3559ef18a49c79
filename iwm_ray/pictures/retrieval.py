"""The retrieval gallery: what the world model imagines for an action, shown as the nearest view of the bank."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from iwm_ray.evaluation.banks import bank_views, clean_actions
from iwm_ray.evaluation.mrr import MrrResult
from iwm_ray.pictures.style import DPI, GREEN, GREY, HEADING, INK, ORANGE, RED, SMALL, TEXT, TITLE, show_image
from iwm_ray.pictures.words import action_words
from iwm_ray.views.policy import ViewPolicy

_SIDE, _WORDS, _GAP = 1.5, 1.55, 0.14  # inches: an image, the column of words, between columns
_LINE, _HEAD, _FOOT = 0.34, 1.22, 0.52  # inches: below an image, above and below all rows
_EDGE = 0.22  # inches: at the sides
_NEAR = 10  # ranks up to this are marked as near
# Of a first rank, a near one, one beyond: the palette's red looks orange beside its orange.
FRAMES = (GREEN, ORANGE, INK)
_COLUMNS = ("clean image", "action", "true view", "imagined", "with the null action", "with another action")


class _Case(NamedTuple):
    """One row: a view of an image."""

    image: int
    view: int
    worst: bool


def retrieval_gallery(
    result: MrrResult,
    images: NDArray[np.uint8],
    policy: ViewPolicy,
    conditioning: str,
    num_rows: int = 4,
    num_worst: int = 2,
) -> Figure:
    """Draws a row for each of a few images: source, action, true view, and the view next to each prediction.

    The first rows are not chosen: they show the first (randomly drawn) view of images at equal distances. The last ones
    are the images with the worst ranks, and marked so.

    Args:
        result: of `measure_mrr`.
        images: `[k s s 3]` uint8, the images that it measured.
        policy: the policy that it used.
        conditioning: how the action enters, for the title.
        num_rows: rows that are not chosen, at most one for each image; 0: a sheet of worst cases.
        num_worst: rows of worst cases, at most one for each image.
    """
    cases = _choose(result, num_rows, num_worst)
    width = 2 * _EDGE + 5 * _SIDE + _WORDS + 5 * _GAP
    height = _HEAD + len(cases) * (_SIDE + _LINE) + _FOOT
    figure = Figure(figsize=(width, height), dpi=DPI)
    subject = "What the world model imagines" if num_rows else "Where the world model fails"
    _write_title(figure, result, conditioning, subject)
    for row, case in enumerate(cases):
        axes = _row_axes(figure, row)
        if row == 0:
            for column, name in zip(axes, _COLUMNS, strict=True):
                column.set_title(name, fontsize=HEADING, color=INK, pad=6)
        _draw_case(axes, result, images, policy, case)
    note = (
        "Imagined: the view of the bank that lies next to the predicted tokens. "
        "Rank: the true view's place by distance to the prediction\n(frames: green 1, orange up to "
        f"{_NEAR}, black beyond)."
    )
    figure.text(_EDGE / width, 0.16 / height, note, fontsize=SMALL, color=GREY, va="bottom")
    return figure


def _choose(result: MrrResult, num_rows: int, num_worst: int) -> list[_Case]:
    ranks = result.table["rank"].astype(float)
    num_images = len(ranks)
    plain = np.unique(np.linspace(0, num_images - 1, min(num_rows, num_images)).astype(int))
    ranks[plain, 0] = 0  # shown already
    worst_views = ranks.argmax(1)
    order = np.argsort(-ranks.max(1), kind="stable")[:num_worst]
    cases = [_Case(int(image), 0, False) for image in plain]
    return cases + [_Case(int(image), int(worst_views[image]), True) for image in order]


def _write_title(figure: Figure, result: MrrResult, conditioning: str, subject: str) -> None:
    """Ranks alone, no MRR: beside a figure of the same name, of other images or seeds, it would be taken for that one."""
    width, height = figure.get_size_inches()
    table = result.table
    first, near, null, other = (
        f"{np.mean(table[name] <= limit):.1%}"
        for name, limit in (
            ("rank", 1),
            ("rank", _NEAR),
            ("zero_action_rank", _NEAR),
            ("shuffled_action_rank", _NEAR),
        )
    )
    lines = (
        f"conditioning: {conditioning};  {len(table['rank'])} images, each with {table['num_views'][0]} views, "
        f"{table['rank'].size:,} cases;  true view ranked first in {first} of them,\n"
        f"among the first {_NEAR} in {near}:  with the null action in {null}, with another view's action in {other}"
    )
    left = _EDGE / width
    figure.text(left, 1 - 0.17 / height, subject, fontsize=TITLE, fontweight="bold", color=INK, va="top")
    figure.text(left, 1 - 0.45 / height, lines, fontsize=TEXT, color=GREY, va="top", linespacing=1.35)


def _row_axes(figure: Figure, row: int) -> list[Axes]:
    """One axes for each column; all measures in inches, so that rows look the same however many there are."""
    width, height = figure.get_size_inches()
    bottom = height - _HEAD - (row + 1) * (_SIDE + _LINE) + _LINE
    axes, left = [], _EDGE
    for name in _COLUMNS:
        column = _WORDS if name == "action" else _SIDE
        axes.append(figure.add_axes((left / width, bottom / height, column / width, _SIDE / height)))
        left += column + _GAP
    return axes


def _draw_case(
    axes: Sequence[Axes], result: MrrResult, images: NDArray[np.uint8], policy: ViewPolicy, case: _Case
) -> None:
    source, words, target, *imagined = axes
    image, view, _ = case
    table, num_views = result.table, int(result.table["num_views"][image])
    rows = slice(image * num_views, (image + 1) * num_views)
    draws = {name: column[rows] for name, column in result.draws.items()}
    bank = bank_views(policy, images[image], draws)
    show_image(source, images[image])
    source.set_xlabel(f"image {image + 1}", fontsize=SMALL, color=GREY, labelpad=3)
    _write_action(words, clean_actions(policy, draws)[view], policy, case.worst)
    show_image(target, bank[view])
    target.set_xlabel(f"view {view + 1} of {num_views}", fontsize=SMALL, color=GREY, labelpad=3)
    nearest = (
        table["nearest"][image, view],
        table["zero_nearest"][image],
        table["nearest"][image, table["shuffled"][image, view]],
    )
    ranks = (table[f"{name}rank"][image, view] for name in ("", "zero_action_", "shuffled_action_"))
    for column, found, rank in zip(imagined, nearest, ranks, strict=True):
        color = FRAMES[int(rank > 1) + int(rank > _NEAR)]
        show_image(column, bank[found], frame=color, frame_width=2)
        column.set_xlabel(f"rank {rank:g}", fontsize=TEXT, color=INK, fontweight="bold", labelpad=3)


def _write_action(axes: Axes, action: NDArray[np.float32], policy: ViewPolicy, worst: bool) -> None:
    axes.set_axis_off()
    axes.title.set(x=0, ha="left")
    phrases = action_words(action, policy.schema)
    axes.text(0, 0.5, "\n".join(phrases), fontsize=TEXT, color=INK, va="center", linespacing=1.7)
    if worst:
        axes.text(0, 0.97, "among the worst", fontsize=TEXT, color=RED, fontweight="bold", va="top")
