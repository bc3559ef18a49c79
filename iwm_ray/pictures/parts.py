"""The parts of a run's page: figures, what they say in words for those who cannot see them, and what to look for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from iwm_ray.evaluation.mrr import MrrResult
from iwm_ray.pictures.bars import ErrorRow, Metrics, action_r2_bars, error_curves, mrr_bars
from iwm_ray.pictures.curves import training_curves
from iwm_ray.pictures.maps import TINY_GRID, TokenMaps, token_maps
from iwm_ray.pictures.retrieval import retrieval_gallery
from iwm_ray.pictures.slider import Slide, slider_sheet
from iwm_ray.views.policy import ViewPolicy

_NUM_WORST = 6
_NUM_SLIDER_SHEETS = 2


@dataclass(frozen=True)
class Part:
    """One section of the page."""

    name: str
    """letters, digits and hyphens: its anchor and the name of its files"""
    title: str
    caption: str
    figures: tuple[tuple[Figure, str], ...]
    """each with its alternative text"""


def retrieval_part(
    result: MrrResult, images: NDArray[np.uint8], policy: ViewPolicy, conditioning: str
) -> Part:
    """The gallery; arguments as of `retrieval_gallery`."""
    caption = (
        "From the clean image and the action in words the model imagines a view; shown is the view of the bank that lies "
        "next to what it imagined. Look for: “imagined” looks like “true view”, while the two columns to its right, where "
        "the action was left out or taken from another view, do not. The last rows are among the worst."
    )
    alt = (
        f"Rows of images with an action each: the true view was ranked first in {result.metrics['mrr/h1']:.0%} of all "
        f"cases and among the first ten in {result.metrics['mrr/h10']:.0%}."
    )
    figure = retrieval_gallery(result, images, policy, conditioning)
    return Part("retrieval", "What the model imagines", caption, ((figure, alt),))


def worst_part(result: MrrResult, images: NDArray[np.uint8], policy: ViewPolicy, conditioning: str) -> Part:
    """The worst view of each of the worst images; arguments as of `retrieval_gallery`."""
    caption = (
        "The same for the images with the worst ranks, one view each. Look for what they have in common: are they views "
        "that lost much of the picture, very dark or burnt out, or is one component of the action always large?"
    )
    worst = np.sort(result.table["rank"].max(1))[::-1][:_NUM_WORST]
    words = ", ".join(f"{rank:g}" for rank in worst)
    alt = f"The views with the worst ranks: {words} of {result.table['num_views'][0]}."
    figure = retrieval_gallery(result, images, policy, conditioning, num_rows=0, num_worst=_NUM_WORST)
    return Part("retrieval-worst", "Where it fails", caption, ((figure, alt),))


def slider_part(slides: Sequence[Slide], images: NDArray[np.uint8], policy: ViewPolicy) -> Part:
    """A sheet for each of the first images; arguments as of `slider_sheet`."""
    words = ", ".join(f"{slide.field.name} {slide.agreements.mean():.2f}" for slide in slides)
    caption = (
        "One component of the action moves over its range while the others stay put (numbers: deviation from the "
        "unchanged image; hue in turns of the colour circle). Look for: the lower line changes as the upper one does, and "
        "the curve follows the dashed diagonal. A model that ignores the action shows the same view all along, a flat "
        f"curve and agreement 0. Agreement here: {words}. (Grayscale, blur and solarize are only ever undone, and a clean "
        "image has none of them; so they have no slider.)"
    )
    figures = [
        (
            slider_sheet(slides, images, policy, number),
            f"Image {number + 1}: true views over retrieved ones for a sweep of each component. Agreement: {words}.",
        )
        for number in range(min(_NUM_SLIDER_SHEETS, len(images)))
    ]
    return Part("slider", "One component at a time", caption, tuple(figures))


def components_part(
    trained: Metrics, untrained: Metrics, components: Sequence[str], num_views: int, num_images: int
) -> Part:
    """MRR by component; the first arguments as of `mrr_bars`."""
    caption = (
        f"Banks of {num_views} views of {num_images} images that differ in one component only; whiskers: 95 % intervals. "
        "Look for: blue bars that reach beyond the dashed line of chance and beyond the grey bars of the same network "
        "before training. Views of such a bank differ little, so these bars are usually lower than that of all components "
        "together: compare them with each other."
    )
    named = [name for name in components if f"mrr/{name}" in trained]
    words = ", ".join(f"{name} {trained[f'mrr/{name}']:.3f}" for name in named)
    alt = f"Bars of MRR, chance {trained['mrr/chance']:.3f}: all together {trained['mrr/mrr']:.3f}, {words}."
    figure = mrr_bars(trained, components, untrained)
    return Part("components", "Which part of the action is known", caption, ((figure, alt),))


def errors_part(slides: Sequence[Slide]) -> Part:
    """Errors of the predictions that the slider showed."""
    rows = error_rows(slides)
    caption = (
        "Squared distance of imagined and true tokens, as a share of the tokens' squared length; line: mean of "
        f"{len(slides[0].errors)} images, band: their range; strength: deviation from the unchanged image. Look for: the "
        "blue line stays low and flat while the orange one, which does not know the action, rises to both sides. Where "
        "both lie together, the action changes nothing in the prediction, or nothing in the tokens."
    )
    error, null_error = (float(np.mean([row[column] for row in rows])) for column in (2, 3))
    alt = f"Curves of error over strength; on average {error:.3f} with the action, {null_error:.3f} without."
    return Part("errors", "Prediction error by strength", caption, ((error_curves(rows), alt),))


def error_rows(slides: Sequence[Slide]) -> list[ErrorRow]:
    """The table that `error_curves` draws: a row for each component, image and position of the slider."""
    return [
        ErrorRow(slide.field.name, float(strength), float(error), float(null_error))
        for slide in slides
        for errors, null_errors in zip(slide.errors, slide.null_errors, strict=True)
        for strength, error, null_error in zip(slide.asked, errors, null_errors, strict=True)
    ]


def maps_part(maps: TokenMaps, policy: ViewPolicy) -> Part:
    """Token maps; arguments as of `token_maps`."""
    rows, columns = maps.encoded.shape[2:4]
    caption = (
        "Each patch is coloured by the first three principal components of its token, with one set of colours for all "
        "maps of an image. Look for: imagined tokens in the colours of the true view's tokens, which change from the "
        f"clean image to the transformed views. The three components hold {maps.explained.mean():.0%} of the variance; "
        "the rest is not seen here."
    )
    if min(rows, columns) < TINY_GRID:
        caption += f" With {rows} x {columns} patches the maps are too coarse for the outlines of things."
    alt = (
        f"Token colours on a grid of {rows} x {columns} patches beside each view; mean cosine of imagined and encoder's "
        f"tokens {maps.cosines.mean():.2f}."
    )
    return Part("maps", "Maps of tokens", caption, ((token_maps(maps, policy), alt),))


def views_part(figure: Figure, num_images: int) -> Part:
    """What a training step sees: the figure of `views_sheet`."""
    caption = (
        "What a training step sees. The predictor gets the tokens of the context and the action, and predicts the tokens "
        "inside the orange line of the target view."
    )
    alt = f"Shared crop, source view, context, targets and action of {num_images} training images."
    return Part("views", "Views, masks and actions", caption, ((figure, alt),))


def action_r2_part(metrics: Metrics, components: Sequence[str], untrained: Metrics | None = None) -> Part:
    """Action R²; arguments as of `action_r2_bars`."""
    caption = (
        "How well a linear map reads the action off the features of two views: 1 is perfect, 0 is no better than always "
        "guessing the mean. Look for: the components that the features still hold."
    )
    named = [name for name in ("mean", *components) if f"action_r2/{name}" in metrics]
    words = ", ".join(f"{name} {metrics[f'action_r2/{name}']:.2f}" for name in named)
    figure = action_r2_bars(metrics, components, untrained)
    return Part("action-r2", "The action in the features", caption, ((figure, f"Bars of R²: {words}."),))


def curves_part(rows: Sequence[Mapping[str, Any]], title: str) -> Part:
    """Training curves; arguments as of `training_curves`."""
    caption = (
        "Look for: the loss falls and levels off; RankMe and spread do not sink towards their floor (collapse); the "
        "action gap rises from zero if the model uses the action."
    )
    last = max((row["step"] for row in rows), default=0)
    alt = f"Small panels of what was measured while training, up to step {last}."
    return Part("curves", "Training curves", caption, ((training_curves(rows, title), alt),))
