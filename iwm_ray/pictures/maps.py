"""Maps of tokens: the first three principal components as colours over the patch grid."""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from iwm_ray.evaluation.banks import bank_views, clean_actions
from iwm_ray.evaluation.features import measuring
from iwm_ray.model.iwm import IWM
from iwm_ray.pictures.imagine import imagined_tokens, view_tokens
from iwm_ray.pictures.style import DPI, GREY, HEADING, INK, PALE, SMALL, TEXT, TITLE, show_image
from iwm_ray.pictures.words import action_words
from iwm_ray.views.draws import Draws
from iwm_ray.views.policy import ViewPolicy

TINY_GRID = 8
"""sides of fewer patches are drawn as patches, and said to be coarse"""

_STRENGTH = 0.75  # of the actions that are shown, in strengths of the jitter
_SIDE, _SPACE, _GROUP = 1.22, 0.05, 0.26  # inches: an image, between images, between actions
_LABEL, _HEAD, _FOOT, _EDGE = (
    0.3,
    1.34,
    0.34,
    0.22,
)  # inches: below a row, above and below all rows, at the sides
_PANELS = ("view", "encoder", "imagined")


@dataclass(frozen=True)
class TokenMaps:
    """Tokens of k images under v actions, the first the null action, and their colours."""

    views: NDArray[np.uint8]
    """`[k v s s 3]`"""
    actions: NDArray[np.float32]
    """`[v a]`, from the clean image to the view"""
    encoded: NDArray[np.float32]
    """`[k v rows columns 3]` colours of the target encoder's tokens of the views, 0..1"""
    imagined: NDArray[np.float32]
    """`[k v rows columns 3]` colours of the tokens that were predicted from the clean image, 0..1"""
    explained: NDArray[np.float64]
    """`[k]` share of the variance of the encoder's tokens that the three components hold, 0..1"""
    cosines: NDArray[np.float64]
    """`[k v]` mean cosine of the predicted and the encoder's tokens, -1..1"""


def measure_maps(
    model: IWM, images: NDArray[np.uint8], policy: ViewPolicy, *, batch_size: int = 256
) -> TokenMaps:
    """Encodes and imagines a darker and a hue-shifted view of each image (whichever components have a strength).

    The components and the range of the colours are one for all maps of an image: they come from the target encoder's
    tokens of all its views. So colours can be compared within an image, not between images.

    Args:
        images: `[k s s 3]` RGB, clean centre crops of the policy's size.
        batch_size: views in one forward pass.
    """
    draws = _draws(policy)
    actions = clean_actions(policy, draws)
    views = np.stack([bank_views(policy, image, draws) for image in images])
    columns = []
    with measuring(model):
        for image, some_views in zip(images, views, strict=True):
            encoded = view_tokens(model, some_views, batch_size).float().cpu().numpy()
            imagined = imagined_tokens(model, image, actions, batch_size).float().cpu().numpy()
            columns.append((*common_colours(encoded, imagined), _cosines(encoded, imagined)))
    encoded, imagined, explained, cosines = (np.stack(column) for column in zip(*columns, strict=True))
    grid = (len(images), len(actions), *model.encoder.grid, 3)
    return TokenMaps(views, actions, encoded.reshape(grid), imagined.reshape(grid), explained, cosines)


def common_colours(
    encoded: NDArray[np.float32], imagined: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    """Colours of two sets of tokens by the principal components of the first.

    Args:
        encoded: `[v n d]`, d at least 3.
        imagined: `[v n d]`.

    Returns:
        `[v n 3]` and `[v n 3]` in 0..1, cut off at the first set's 2nd and 98th percentile; and the share of the first
        set's variance that the three components hold.
    """
    tokens = encoded.reshape(-1, encoded.shape[-1]).astype(np.float64)
    mean = tokens.mean(0)
    _, scales, directions = np.linalg.svd(tokens - mean, full_matrices=False)
    explained = float((scales[:3] ** 2).sum() / max((scales**2).sum(), np.finfo(float).tiny))
    # A component's sign is anybody's choice: the larger entries point up, so that maps do not flip between machines.
    first = directions[:3] * np.sign((directions[:3] ** 3).sum(1, keepdims=True))
    low, high = np.percentile((tokens - mean) @ first.T, (2, 98), axis=0)
    parts = [(part.astype(np.float64) - mean) @ first.T for part in (encoded, imagined)]
    colours = [
        np.clip((part - low) / np.maximum(high - low, 1e-12), 0, 1).astype(np.float32) for part in parts
    ]
    return colours[0], colours[1], explained


def token_maps(maps: TokenMaps, policy: ViewPolicy) -> Figure:
    """Draws a row for each image: for each action the view, the map of its tokens and the map of the imagined ones."""
    num_images, num_actions, rows, columns, _ = maps.encoded.shape
    group = len(_PANELS) * _SIDE + (len(_PANELS) - 1) * _SPACE
    width = max(
        2 * _EDGE + num_actions * group + (num_actions - 1) * _GROUP, 8.6
    )  # inches; the title needs 8.6
    figure = Figure(figsize=(width, _HEAD + num_images * (_SIDE + _LABEL) + _FOOT), dpi=DPI)
    height = figure.get_figheight()
    _write_frame(figure, maps, (rows, columns))
    for number in range(num_actions):
        left = _EDGE + number * (group + _GROUP)
        words = ", ".join(action_words(maps.actions[number], policy.schema))
        name = "null action" if number == 0 else words
        figure.text(
            left / width, 1 - 0.95 / height, name, fontsize=HEADING, fontweight="bold", color=INK, va="center"
        )
        for row in range(num_images):
            bottom = height - _HEAD - row * (_SIDE + _LABEL) - _SIDE
            _draw_group(figure, maps, row, number, left, bottom)
    return figure


def _draws(policy: ViewPolicy) -> Draws:
    """Nothing; the first component of the jitter down; the last one up."""
    fields = [field for field in policy.target_jitter.fields if field.scale]
    changes = [(fields[0], -_STRENGTH), (fields[-1], _STRENGTH)] if fields else []
    draws = policy.identity(1 + len(changes))
    draws["target_jitter"][1:] = True
    for row, (field, strength) in enumerate(changes, start=1):
        draws[f"target_{field.name}"][row] = field.identity + strength * field.scale
    return draws


def _cosines(encoded: NDArray[np.float32], imagined: NDArray[np.float32]) -> NDArray[np.float64]:
    """`[v n d]` twice -> `[v]`."""
    lengths = np.linalg.norm(encoded, axis=2) * np.linalg.norm(imagined, axis=2)
    return ((encoded * imagined).sum(2) / np.maximum(lengths, 1e-12)).mean(1).astype(np.float64)


def _write_frame(figure: Figure, maps: TokenMaps, grid: tuple[int, int]) -> None:
    width, height = figure.get_size_inches()
    rows, columns = grid
    lines = (
        f"First three principal components of the tokens as red, green and blue; grid of {rows} x {columns} patches.\n"
        f"They hold {maps.explained.min():.0%} to {maps.explained.max():.0%} of the variance of an image's tokens."
    )
    if min(grid) < TINY_GRID:
        lines += " So coarse a grid shows no outlines: compare colours patch by patch."
    note = "One set of colours for each image: compare along a row. Cosine: of the imagined and the encoder's tokens."
    left = _EDGE / width
    title = "What the tokens look like"
    figure.text(left, 1 - 0.17 / height, title, fontsize=TITLE, fontweight="bold", color=INK, va="top")
    figure.text(left, 1 - 0.43 / height, lines, fontsize=TEXT, color=GREY, va="top", linespacing=1.35)
    figure.text(left, 0.14 / height, note, fontsize=SMALL, color=GREY, va="bottom")


def _draw_group(figure: Figure, maps: TokenMaps, row: int, number: int, left: float, bottom: float) -> None:
    """View, map and imagined map of one image and action; `left` and `bottom` in inches."""
    width, height = figure.get_size_inches()
    for place, name in enumerate(_PANELS):
        corner = ((left + place * (_SIDE + _SPACE)) / width, bottom / height)
        axes = figure.add_axes((*corner, _SIDE / width, _SIDE / height))
        if name == "view":
            show_image(axes, maps.views[row, number])
        else:
            colours = (maps.encoded if name == "encoder" else maps.imagined)[row, number]
            axes.imshow(
                colours, interpolation="nearest" if min(colours.shape[:2]) < TINY_GRID else "bilinear"
            )
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color(PALE)
        if row == 0:
            axes.set_title(_heading(name, number), fontsize=SMALL, color=GREY, pad=4)
        if name == "imagined":
            axes.set_xlabel(f"cosine {maps.cosines[row, number]:.2f}", fontsize=SMALL, color=INK, labelpad=3)


def _heading(name: str, number: int) -> str:
    return {"view": "clean image" if number == 0 else "true view", "encoder": "its tokens"}.get(
        name, "imagined tokens"
    )
