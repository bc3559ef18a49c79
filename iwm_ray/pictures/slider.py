"""The slider: one component of the action moves over its range; does what the model imagines move with it?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from iwm_ray.evaluation.banks import bank_draws, bank_views, clean_actions
from iwm_ray.evaluation.features import measuring
from iwm_ray.evaluation.ranking import token_distances
from iwm_ray.model.iwm import IWM
from iwm_ray.pictures.imagine import imagined_tokens, view_tokens
from iwm_ray.pictures.style import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    HEADING,
    INK,
    ORANGE,
    PALE,
    RED,
    SKY,
    SMALL,
    TEXT,
    TITLE,
    show_image,
)
from iwm_ray.pictures.words import amount
from iwm_ray.views.actions import ActionField
from iwm_ray.views.draws import Draws
from iwm_ray.views.policy import ViewPolicy

NUM_STEPS = 33
"""positions of the slider, the identity in the middle"""
NUM_DISTRACTORS = 95
"""views of the bank in which all components are jittered"""

_SHOWN_EVERY = 4  # positions: nine of them are drawn
_NEAR = 0.1  # share of the range: a retrieved value this close counts as the asked one
_SIDE, _SPACE = 0.92, 0.06  # inches: an image, between images
_NAMES, _GAP, _CURVE = 1.2, 0.72, 1.75  # inches: names of the rows, before the curve, the curve
_LABEL, _HEAD, _FOOT, _EDGE = (
    0.2,
    0.92,
    0.34,
    0.22,
)  # inches: a line of values, above and below all rows, at the sides
_ROW_GAP = 0.28  # inches: between components


@dataclass(frozen=True)
class Slide:
    """One component moved over its range, the others at their identity; k images, n positions, b views a bank."""

    field: ActionField
    draws: Draws
    """b rows, the bank of every image: first the n views of the sweep, then the distractors"""
    asked: NDArray[np.float64]
    """`[n]` deviations from the identity, in the field's unit, rising"""
    found: NDArray[np.float64]
    """`[k n]` the component's deviation in the view that was retrieved"""
    nearest: NDArray[np.int64]
    """`[k n]` which view of the bank that is"""
    errors: NDArray[np.float64]
    """`[k n]` squared L2 between predicted and true tokens, as a share of the tokens' mean squared length"""
    null_errors: NDArray[np.float64]
    """`[k n]` the same where the prediction had the null action"""

    @property
    def agreements(self) -> NDArray[np.float64]:
        """`[k]` see `agreement`."""
        return np.array([agreement(self.asked, found) for found in self.found])


def agreement(asked: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """Lin's concordance of `[n]` and `[n]` values: 1 where they are equal, 0 where the found ones do not move, -1..1.

    Unlike the correlation it is lowered by a wrong slope and a shift, and defined for found values that are all alike.
    """
    covariance = np.mean((asked - asked.mean()) * (found - found.mean()))
    return float(2 * covariance / (asked.var() + found.var() + (asked.mean() - found.mean()) ** 2))


def measure_slides(
    model: IWM,
    images: NDArray[np.uint8],
    policy: ViewPolicy,
    *,
    seed: int,
    batch_size: int = 256,
) -> list[Slide]:
    """Moves each component of the jitter that has a strength; the model keeps its weights and training flags.

    The bank of a component holds a view for each position of the slider and others in which all components are
    jittered, the same for every image.

    Args:
        images: `[k s s 3]` RGB, clean centre crops of the policy's size.
        seed: of the distractors.
        batch_size: views in one forward pass.
    """
    with measuring(model):
        return [
            _slide(model, images, policy, field, seed, batch_size)
            for field in policy.target_jitter.fields
            if field.scale
        ]


def _slide(
    model: IWM,
    images: NDArray[np.uint8],
    policy: ViewPolicy,
    field: ActionField,
    seed: int,
    batch_size: int,
) -> Slide:
    draws = _bank(policy, field, seed)
    values = draws[f"target_{field.name}"].astype(np.float64) - field.identity
    actions = clean_actions(policy, draws)[:NUM_STEPS]
    actions = np.concatenate([actions, np.zeros_like(actions[:1])])  # the last row: the null action
    nearest, errors, null_errors = [], [], []
    for image in images:
        bank = view_tokens(model, bank_views(policy, image, draws), batch_size)
        distances = token_distances(imagined_tokens(model, image, actions, batch_size), bank).cpu().numpy()
        nearest.append(distances[:-1].argmin(1))
        errors.append(distances[:-1].diagonal())
        null_errors.append(distances[-1, :NUM_STEPS])
    places = np.stack(nearest)
    return Slide(
        field, draws, values[:NUM_STEPS], values[places], places, np.stack(errors), np.stack(null_errors)
    )


def _bank(policy: ViewPolicy, field: ActionField, seed: int) -> Draws:
    sweep = policy.identity(NUM_STEPS)
    name = f"target_{field.name}"
    values = field.identity + np.linspace(-field.scale, field.scale, NUM_STEPS)
    sweep |= {name: values.astype(np.float32), "target_jitter": np.ones(NUM_STEPS, bool)}
    others = bank_draws(policy, np.arange(1), NUM_DISTRACTORS, seed)
    return {column: np.concatenate([sweep[column], others[column]]) for column in sweep}


def slider_sheet(
    slides: Sequence[Slide], images: NDArray[np.uint8], policy: ViewPolicy, shown: int = 0
) -> Figure:
    """Draws a row for each component: the true views over the retrieved ones, and found against asked values.

    Args:
        slides: of `measure_slides`, at least one.
        images: `[k s s 3]` uint8, what it measured.
        policy: the policy that it used.
        shown: number of the image whose views are drawn; the curves show all images.
    """
    places = range(0, NUM_STEPS, _SHOWN_EVERY)
    width = 2 * _EDGE + _NAMES + len(places) * _SIDE + (len(places) - 1) * _SPACE + _GAP + _CURVE
    row_height = 2 * _SIDE + _SPACE + 2 * _LABEL + _ROW_GAP
    figure = Figure(figsize=(width, _HEAD + len(slides) * row_height + _FOOT), dpi=DPI)
    _write_frame(figure, slides, shown)
    for row, slide in enumerate(slides):
        top = figure.get_figheight() - _HEAD - row * row_height - _LABEL
        _draw_strips(figure, slide, images[shown], policy, top, places, shown)
        _draw_curve(figure, slide, top, shown)
    return figure


def _write_frame(figure: Figure, slides: Sequence[Slide], shown: int) -> None:
    width, height = figure.get_size_inches()
    left = _EDGE / width
    mean = np.mean([slide.agreements.mean() for slide in slides])
    title = f"One component moves: does what is imagined follow?  Agreement {_signed(mean)}"
    line = (
        f"Agreement: 1 where the retrieved view follows the action, 0 where it ignores it; mean of {len(slides[0].found)} "
        f"images. Views of image {shown + 1}; bank of {NUM_STEPS + NUM_DISTRACTORS} views."
    )
    note = (
        f"Frames: green, the retrieved value lies within {_NEAR:.0%} of the range of the asked one; red, it does not; "
        "orange, a view in which other components changed as well."
    )
    figure.text(left, 1 - 0.17 / height, title, fontsize=TITLE, fontweight="bold", color=INK, va="top")
    figure.text(left, 1 - 0.45 / height, line, fontsize=TEXT, color=GREY, va="top")
    figure.text(left, 0.14 / height, note, fontsize=SMALL, color=GREY, va="bottom")


def _draw_strips(
    figure: Figure,
    slide: Slide,
    image: NDArray[np.uint8],
    policy: ViewPolicy,
    top: float,
    places: Sequence[int],
    shown: int,
) -> None:
    """The two lines of views; `top` in inches from below."""
    width, height = figure.get_size_inches()
    bank = bank_views(policy, image, slide.draws)
    upper, lower = top - _SIDE, top - 2 * _SIDE - _SPACE
    figure.text(
        _EDGE / width,
        (upper + _SIDE / 2) / height,
        slide.field.name,
        fontsize=HEADING,
        fontweight="bold",
        color=INK,
    )
    figure.text(_EDGE / width, (upper + _SIDE / 4) / height, "true views", fontsize=TEXT, color=GREY)
    figure.text(_EDGE / width, (lower + _SIDE / 2) / height, "imagined", fontsize=TEXT, color=GREY)
    for column, place in enumerate(places):
        left = (_EDGE + _NAMES + column * (_SIDE + _SPACE)) / width
        size = (_SIDE / width, _SIDE / height)
        true = figure.add_axes((left, upper / height, *size))
        show_image(true, bank[place])
        true.set_title(_amount(slide.asked[place], slide.field), fontsize=SMALL, color=INK, pad=3)
        imagined = figure.add_axes((left, lower / height, *size))
        show_image(
            imagined, bank[slide.nearest[shown, place]], frame=_frame(slide, shown, place), frame_width=2
        )
        found = _amount(slide.found[shown, place], slide.field)
        imagined.set_xlabel(found, fontsize=SMALL, color=INK, labelpad=3)


def _frame(slide: Slide, shown: int, place: int) -> str:
    if slide.nearest[shown, place] >= NUM_STEPS:
        return ORANGE
    distance = abs(slide.found[shown, place] - slide.asked[place])
    return GREEN if distance <= 2 * _NEAR * slide.field.scale + 1e-6 else RED


def _draw_curve(figure: Figure, slide: Slide, top: float, shown: int) -> None:
    width, height = figure.get_size_inches()
    left = width - _EDGE - _CURVE
    axes = figure.add_axes((left / width, (top - _CURVE) / height, _CURVE / width, _CURVE / height))
    reach = slide.field.scale
    axes.plot([-reach, reach], [-reach, reach], color=GREY, linewidth=0.9, linestyle="--")
    for number, found in enumerate(slide.found):
        if number != shown:
            axes.plot(slide.asked, found, color=SKY, linewidth=0.8, alpha=0.6)
    axes.plot(slide.asked, slide.found[shown], color=BLUE, linewidth=1.6)
    axes.set_title(
        f"agreement {_signed(slide.agreements.mean())}", fontsize=TEXT, color=INK, pad=4, fontweight="bold"
    )
    axes.set_xlim(-reach * 1.06, reach * 1.06)
    axes.set_ylim(-reach * 1.06, reach * 1.06)
    ticks = [-reach, 0, reach]
    axes.set_xticks(ticks, [_amount(tick, slide.field) for tick in ticks])
    axes.set_yticks(ticks, [_amount(tick, slide.field) for tick in ticks])
    axes.tick_params(length=0, labelsize=SMALL, colors=GREY)
    unit = "" if slide.field.unit == "factor" else f" ({slide.field.unit})"
    axes.set_xlabel(f"asked{unit}", fontsize=SMALL, color=GREY, labelpad=1)
    axes.set_ylabel("found", fontsize=SMALL, color=GREY, labelpad=-8)
    axes.grid(color=PALE, linewidth=0.6)
    axes.spines[:].set_color(PALE)


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _amount(deviation: float, field: ActionField) -> str:
    """Short: the unit stands in the caption."""
    words = amount(deviation / field.scale, field).split()[0]
    return "0" if float(words.replace("\N{MINUS SIGN}", "-")) == 0 else words
