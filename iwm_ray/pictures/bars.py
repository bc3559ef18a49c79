"""Figures of figures: what is known of each component of the action, beside chance and beside untrained weights."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from iwm_ray.pictures.style import BLUE, DPI, GREY, HEADING, INK, ORANGE, PALE, SMALL, TEXT, TITLE

Metrics = Mapping[str, float]

_BAR, _HEAD, _FOOT = 0.62, 0.85, 0.4  # inches: a component, above and below all of them
_WIDTH, _NAMES, _VALUES = 8.6, 1.5, 1.9  # inches: the figure, names on the left, values on the right


def mrr_bars(trained: Metrics, components: Sequence[str], untrained: Metrics | None = None) -> Figure:
    """Draws `mrr/<component>` and, above them, `mrr/mrr`; whiskers where there are `_low` and `_high`.

    Args:
        trained: `mrr/mrr`, `mrr/chance`, `mrr/<component>`, ...; a component that is missing is left out.
        components: in the order in which they are drawn.
        untrained: the same of the weights that training started from.
    """
    names = {"mrr/mrr": "all together"} | {f"mrr/{component}": component for component in components}
    title = "MRR by component: which part of the action is known?"
    chance = trained["mrr/chance"]
    return _bars(title, names, trained, untrained, (chance, "chance"), reach=3 * chance)


def action_r2_bars(trained: Metrics, components: Sequence[str], untrained: Metrics | None = None) -> Figure:
    """Draws `action_r2/<component>` and `action_r2/mean`: how well the action can be read off features of two views.

    Args:
        trained: `action_r2/mean`, `action_r2/<component>`, ...; what is missing is left out.
        components: in the order in which they are drawn.
        untrained: the same of the weights that training started from.
    """
    names = {"action_r2/mean": "mean"} | {f"action_r2/{component}": component for component in components}
    title = "Action R²: how much of the action can be read off the features?"
    return _bars(title, names, trained, untrained, (0.0, "always guessing the mean:"), reach=1.0)


def _bars(
    title: str,
    names: Mapping[str, str],
    trained: Metrics,
    untrained: Metrics | None,
    chance: tuple[float, str],
    reach: float,
) -> Figure:
    """The axis ends at `reach` at least, so that bars of mere chance do not fill it."""
    level, level_name = chance
    shown = [metric for metric in names if metric in trained]
    figure = Figure(figsize=(_WIDTH, _HEAD + _BAR * max(1, len(shown)) + _FOOT), dpi=DPI)
    height = figure.get_figheight()
    figure.text(
        0.22 / _WIDTH, 1 - 0.17 / height, title, fontsize=TITLE, fontweight="bold", color=INK, va="top"
    )
    size = (1 - (_NAMES + _VALUES) / _WIDTH, 1 - (_HEAD + _FOOT) / height)
    axes = figure.add_axes((_NAMES / _WIDTH, _FOOT / height, *size))
    groups = [(trained, BLUE, "trained")] + ([(untrained, GREY, "untrained")] if untrained else [])
    thickness = 0.72 / len(groups)
    for number, (metrics, color, label) in enumerate(groups):
        places = np.arange(len(shown)) + (number - (len(groups) - 1) / 2) * thickness
        _draw_bars(axes, places, shown, metrics, thickness * 0.9, color, label)
    axes.axvline(
        level, color=ORANGE, linewidth=1.4, linestyle="--", label=f"{level_name} {level:.3g}", zorder=3
    )
    axes.set_yticks(np.arange(len(shown)), [names[metric] for metric in shown])
    axes.set_ylim(max(1, len(shown)) - 0.5, -0.5)
    values = [bound for metrics, *_ in groups for metric in shown for bound in _bounds(metrics, metric)]
    axes.set_xlim(min([0.0, *values]), max([reach, *values]))
    _dress(axes)
    axes.tick_params(axis="y", labelsize=TEXT, labelcolor=INK)
    box = (0.22 / _WIDTH, 1 - 0.42 / height)
    figure.legend(
        loc="upper left",
        bbox_to_anchor=box,
        ncols=3,
        fontsize=TEXT,
        frameon=False,
        labelcolor=GREY,
        borderaxespad=0,
    )
    return figure


def _draw_bars(
    axes: Axes,
    places: Sequence[float] | np.ndarray,
    shown: Sequence[str],
    metrics: Metrics,
    thickness: float,
    color: str,
    label: str,
) -> None:
    values = [metrics.get(metric, math.nan) for metric in shown]
    axes.barh(places, values, height=thickness, color=color, label=label)
    for place, metric, value in zip(places, shown, values, strict=True):
        if math.isnan(value):
            continue
        low, high = _bounds(metrics, metric)
        interval = f"  [{low:.3f}, {high:.3f}]" if low < high else ""
        if interval:
            axes.plot([low, high], [place, place], color=INK, linewidth=1.2, marker="|", markersize=5)
        # Beside the axes, not beside the bar: whiskers and the line of chance cross nothing there.
        axes.annotate(
            f"{value:.3f}{interval}".replace("-", "\N{MINUS SIGN}"),
            (1, place),
            (6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=SMALL,
            color=INK,
            va="center",
        )


def _bounds(metrics: Metrics, metric: str) -> tuple[float, float]:
    """Ends of the interval, or the value twice where there is none."""
    value = metrics.get(metric, 0.0)
    return metrics.get(f"{metric}_low", value), metrics.get(f"{metric}_high", value)


class ErrorRow(NamedTuple):
    """How far off a prediction was."""

    component: str
    strength: float
    """signed deviation from the identity, in the component's unit"""
    error: float
    """with the true action"""
    null_error: float
    """with the null action"""


def error_curves(rows: Sequence[ErrorRow]) -> Figure:
    """Draws, for each component, the prediction's error over the strength of the action, beside the null action's.

    Args:
        rows: in any order; of several rows of one component and strength the mean is drawn, and their range as a band.
    """
    components = list(dict.fromkeys(row.component for row in rows))
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, rect=(0, 0, 1, 0.78))
    figure = Figure(figsize=(2.9 * max(3, len(components)), 3.6), dpi=DPI, layout=layout)
    title = "Prediction error by component and strength"
    figure.text(0.01, 0.95, title, fontsize=TITLE, fontweight="bold", color=INK, va="top")
    highest = max((max(row.error, row.null_error) for row in rows), default=1.0)
    for number, component in enumerate(components):
        axes = figure.add_subplot(1, len(components), number + 1)
        own = [row for row in rows if row.component == component]
        # The wide line stays visible where a model that ignores actions makes the two one.
        _draw_error(axes, own, [row.null_error for row in own], ORANGE, "null action", width=3.0)
        _draw_error(axes, own, [row.error for row in own], BLUE, "true action", width=1.4)
        axes.set_title(component, fontsize=HEADING, color=INK, loc="left")
        axes.set_ylim(0, highest * 1.05 or 1.0)
        reach = max(abs(row.strength) for row in own) or 1.0
        axes.set_xlim(-1.12 * reach, 1.12 * reach)  # no label in the corner, where the other axis has one
        axes.set_xlabel("strength", fontsize=SMALL, color=GREY)
        _dress(axes, grid="y")
        axes.yaxis.set_major_locator(MaxNLocator(4))
    if components:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="upper left",
            bbox_to_anchor=(0.003, 0.88),
            ncols=2,
            fontsize=TEXT,
            frameon=False,
            labelcolor=GREY,
        )
    return figure


def _draw_error(
    axes: Axes, rows: Sequence[ErrorRow], errors: Sequence[float], color: str, label: str, width: float
) -> None:
    strengths = sorted({row.strength for row in rows})
    groups = [
        [error for row, error in zip(rows, errors, strict=True) if row.strength == strength]
        for strength in strengths
    ]
    axes.fill_between(
        strengths,
        [min(group) for group in groups],
        [max(group) for group in groups],
        color=color,
        alpha=0.15,
        lw=0,
    )
    axes.plot(
        strengths, [float(np.mean(group)) for group in groups], color=color, linewidth=width, label=label
    )


def _dress(axes: Axes, grid: Literal["x", "y"] = "x") -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis=grid, color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=SMALL, colors=GREY)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PALE)
