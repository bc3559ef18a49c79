"""The map of a sweep: what a world model knows of its actions against what its representation is good for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from iwm_ray.pictures.style import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    HEADING,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    SKY,
    SMALL,
    TEXT,
)

Range = tuple[float, float]

_COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
_MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Dot:
    """A configuration on the map."""

    x: float
    y: float
    x_range: Range
    y_range: Range
    """95 % intervals; NaN: unknown"""
    seeds: tuple[tuple[float, float], ...]
    """(x, y) of each repetition"""
    color: str
    """value of the axis that colours tell apart"""
    marker: str
    """value of the axis that shapes tell apart"""
    name: str = ""
    """written beside it"""


@dataclass(frozen=True)
class Panel:
    """One outcome."""

    title: str
    note: str
    """the relation in words"""
    dots: tuple[Dot, ...]
    is_difference: bool = False
    """a zero line is drawn, and no interval of a top-1 is meant"""


@dataclass(frozen=True)
class Bar:
    """A rank correlation, and the paper's."""

    name: str
    value: float
    low: float
    high: float
    paper: float | None
    count: int


def spectrum_map(
    panels: Sequence[Panel],
    chance: float,
    color_axis: str,
    colors: Sequence[str],
    marker_axis: str,
    markers: Sequence[str],
) -> Figure:
    """Draws MRR on x against each outcome in percent on y.

    Args:
        panels: in order, at most three in a row.
        chance: MRR by chance; NaN: not drawn.
        color_axis: what colours mean; empty: nothing.
        colors: its values in order.
        marker_axis: what shapes mean; empty: nothing.
        markers: its values in order.
    """
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    width, height = max(6.4, 3.9 * columns), 3.6 * rows + 1.1
    figure = Figure(figsize=(width, height), dpi=DPI)
    left, right, top, bottom = 0.75, 0.25, 0.62, 1.3
    grid = figure.add_gridspec(
        rows, columns, left=left / width, right=1 - right / width, top=1 - top / height, bottom=bottom / height,
        wspace=0.28, hspace=0.42,
    )  # fmt: skip
    color_of = {name: _COLORS[number % len(_COLORS)] for number, name in enumerate(colors)}
    marker_of = {name: _MARKERS[number % len(_MARKERS)] for number, name in enumerate(markers)}
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(grid[number // columns, number % columns])
        _draw_panel(axes, panel, chance, color_of, marker_of)
        if number >= len(panels) - columns:
            axes.set_xlabel("MRR", fontsize=TEXT, color=INK)
    _legends(figure, chance, (color_axis, color_of), (marker_axis, marker_of))
    return figure


def _legends(
    figure: Figure,
    chance: float,
    colors: tuple[str, Mapping[str, str]],
    markers: tuple[str, Mapping[str, str]],
) -> None:
    """Three keys in a row at the foot: what colours, shapes and lines mean."""
    lines = [
        Line2D([], [], color=GREY, marker="o", ls="", ms=3, alpha=0.6, label="one seed"),
        Line2D([], [], color=GREY, lw=1.2, label="95 % interval"),
    ]
    if np.isfinite(chance):
        lines.append(Line2D([], [], color=GREY, lw=1.2, ls="--", label="MRR by chance"))
    keys = {
        colors[0]: [
            Line2D([], [], color=color, marker="o", ls="", label=name) for name, color in colors[1].items()
        ],
        markers[0]: [
            Line2D([], [], color=INK, marker=mark, ls="", label=name) for name, mark in markers[1].items()
        ],
        "marks": lines,
    }
    shown = {title: handles for title, handles in keys.items() if title and handles}
    for number, (title, handles) in enumerate(shown.items()):
        figure.legend(
            handles=handles, title=title, loc="lower center", bbox_to_anchor=((number + 0.5) / len(shown), 0.0),
            ncol=2 if len(handles) > 2 else 1, fontsize=SMALL, title_fontsize=SMALL, frameon=False, labelcolor=INK,
            columnspacing=1.2,
        )  # fmt: skip


def _draw_panel(
    axes: Axes, panel: Panel, chance: float, color_of: Mapping[str, str], marker_of: Mapping[str, str]
) -> None:
    if np.isfinite(chance):
        axes.axvline(chance, color=GREY, lw=1.2, ls="--", zorder=1)
    if panel.is_difference:
        axes.axhline(0, color=PALE, lw=1.2, zorder=0)
    for dot in panel.dots:
        color, marker = color_of.get(dot.color, BLUE), marker_of.get(dot.marker, "o")
        for x, y in dot.seeds:
            axes.plot(x, 100 * y, "o", ms=3, color=color, alpha=0.45, mew=0, zorder=2)
        axes.errorbar(
            dot.x, 100 * dot.y, xerr=_whiskers(dot.x, dot.x_range), yerr=100 * _whiskers(dot.y, dot.y_range),
            fmt=marker, ms=6.5, color=color, mec="white", mew=0.7, elinewidth=1.2, ecolor=color, zorder=3,
        )  # fmt: skip
    for dot in panel.dots:
        if dot.name:
            axes.annotate(
                dot.name, (dot.x, 100 * dot.y), xytext=(5, 9), textcoords="offset points", fontsize=SMALL, color=INK,
                path_effects=[withStroke(linewidth=2.5, foreground="white")], zorder=5,
                ha="left" if dot.name == "invariant" else "right",
            )  # fmt: skip
    axes.set_title(panel.title, fontsize=HEADING, fontweight="bold", color=INK, loc="left", pad=17)
    axes.text(0, 1.02, panel.note, transform=axes.transAxes, fontsize=SMALL, color=GREY, va="bottom")
    axes.set_ylabel("points" if panel.is_difference else "top-1, %", fontsize=TEXT, color=INK)
    axes.margins(0.09)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    _dress(axes)


def _whiskers(value: float, ends: Range) -> NDArray[np.float64]:
    """`[2 1]` lengths below and above; 0 where unknown."""
    low, high = ends
    return np.nan_to_num([[max(0.0, value - low)], [max(0.0, high - value)]])


def effect_grid(
    effects: Mapping[tuple[str, str], Mapping[str, Sequence[float]]], percent: Sequence[str]
) -> Figure:
    """Draws, for each axis (columns) and metric (rows), the figures of the configurations with each value, and their mean.

    Args:
        effects: (axis, metric in words) -> value of the axis -> figures.
        percent: metrics shown in percent.
    """
    axes_names = list(dict.fromkeys(axis for axis, _ in effects))
    metrics = list(dict.fromkeys(metric for _, metric in effects))
    width, height = max(5.0, 2.9 * len(axes_names) + 0.9), 2.1 * len(metrics) + 0.9
    figure = Figure(figsize=(width, height), dpi=DPI)
    grid = figure.add_gridspec(
        len(metrics), len(axes_names), left=0.8 / width, right=1 - 0.2 / width, top=1 - 0.3 / height,
        bottom=0.75 / height, wspace=0.12, hspace=0.16,
    )  # fmt: skip
    for row, metric in enumerate(metrics):
        first: Axes | None = None
        for column, axis in enumerate(axes_names):
            axes = figure.add_subplot(grid[row, column], sharey=first)
            values = effects.get((axis, metric), {})
            scale = 100 if metric in percent else 1
            _draw_effect(axes, {name: scale * np.asarray(found) for name, found in values.items()})
            if first is None:
                first = axes
                axes.set_ylabel(metric + (", %" if scale == 100 else ""), fontsize=TEXT, color=INK)
            else:
                axes.tick_params(labelleft=False)
            if row == len(metrics) - 1:
                axes.set_xlabel(axis, fontsize=TEXT, color=INK)
            else:
                axes.tick_params(labelbottom=False)
    return figure


def _draw_effect(axes: Axes, values: Mapping[str, NDArray[np.float64]]) -> None:
    places = np.arange(len(values))
    for place, found in zip(places, values.values(), strict=True):
        shift = np.linspace(-0.12, 0.12, len(found)) if len(found) > 1 else np.zeros(1)
        axes.plot(place + shift, found, "o", ms=3.5, color=SKY, mew=0, alpha=0.8, zorder=2)
    axes.plot(places, [found.mean() for found in values.values()], "o-", color=BLUE, ms=6, lw=1.5, zorder=3)
    axes.set_xticks(places, list(values))
    axes.set_xlim(-0.5, max(1, len(values)) - 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _dress(axes)


def heat_maps(
    tables: Mapping[str, NDArray[np.float64]],
    rows: Sequence[str],
    columns: Sequence[str],
    names: tuple[str, str],
) -> Figure:
    """Draws MRR over two axes, one table for each value of a third.

    Args:
        tables: title (empty: no third axis) -> `[r c]` MRR, NaN where nothing was measured.
        rows: values of the first axis.
        columns: values of the second.
        names: of the two axes.
    """
    count = len(tables)
    cell_width, cell_height = 1.0, 0.55
    width = 1.6 + count * (cell_width * len(columns) + 0.35) + 1.0
    height = 1.1 + cell_height * len(rows)
    figure = Figure(figsize=(max(width, 4.5), height), dpi=DPI)
    width = figure.get_figwidth()
    top = max((float(np.nanmax(table)) for table in tables.values() if np.isfinite(table).any()), default=1.0)
    grid = figure.add_gridspec(
        1,
        count,
        left=1.35 / width,
        right=1 - 1.15 / width,
        top=1 - 0.4 / height,
        bottom=0.6 / height,
        wspace=0.12,
    )
    image = None
    for number, (title, table) in enumerate(tables.items()):
        axes = figure.add_subplot(grid[0, number])
        image = axes.imshow(np.ma.masked_invalid(table), cmap="cividis", vmin=0, vmax=top, aspect="auto")
        axes.set_facecolor(PALE)
        for row, column in np.ndindex(*table.shape):
            value = table[row, column]
            text = f"{value:.3f}" if np.isfinite(value) else "none"
            dark = np.isfinite(value) and value < 0.55 * top
            axes.text(
                column, row, text, ha="center", va="center", fontsize=TEXT, color="white" if dark else INK
            )
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows if number == 0 else [])
        axes.set_xlabel(names[1], fontsize=TEXT, color=INK)
        if number == 0:
            axes.set_ylabel(names[0], fontsize=TEXT, color=INK)
        axes.set_title(title, fontsize=HEADING, color=INK, loc="left")
        axes.tick_params(labelsize=SMALL, colors=INK, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    if image is not None:
        side = figure.add_axes((1 - 0.95 / width, 0.6 / height, 0.16 / width, 1 - 1.0 / height))
        bar = figure.colorbar(image, cax=side)
        bar.set_label("MRR", fontsize=TEXT, color=INK)
        bar.ax.tick_params(labelsize=SMALL, colors=INK)
        bar.outline.set_visible(False)
    return figure


def correlation_bars(bars: Sequence[Bar]) -> Figure:
    """Draws rank correlations with MRR and their 95 % intervals, the paper's values as diamonds."""
    width, height = 7.6, 1.15 + 0.5 * len(bars)
    figure = Figure(figsize=(width, height), dpi=DPI)
    axes = figure.add_axes((2.75 / width, 0.62 / height, 1 - 3.75 / width, 1 - 1.0 / height))
    axes.axvline(0, color=GREY, lw=1.0, zorder=1)
    for place, bar in enumerate(bars):
        if np.isfinite(bar.value):
            axes.plot([bar.low, bar.high], [place, place], color=BLUE, lw=2, solid_capstyle="butt", zorder=2)
            axes.plot(bar.value, place, "o", color=BLUE, ms=7, mec="white", mew=0.7, zorder=4)
        else:
            axes.text(0.03, place, "too few configurations", fontsize=SMALL, color=GREY, va="center")
        if bar.paper is not None:
            axes.plot(bar.paper, place, "D", color=ORANGE, ms=6, mec="white", mew=0.7, zorder=3)
        text = f"{bar.value:+.2f}, n = {bar.count}" if np.isfinite(bar.value) else f"n = {bar.count}"
        axes.text(1.06, place, text.replace("-", "−"), fontsize=SMALL, color=INK, va="center", clip_on=False)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(-1.03, 1.03)
    axes.set_xlabel("rank correlation with MRR, over configurations", fontsize=TEXT, color=INK)
    handles = [
        Line2D([], [], color=BLUE, marker="o", lw=2, label="these trials, 95 % interval"),
        Line2D([], [], color=ORANGE, marker="D", ls="", label="paper, ImageNet"),
    ]
    figure.legend(handles=handles, loc="upper center", ncol=2, fontsize=SMALL, frameon=False, labelcolor=INK)
    _dress(axes)
    return figure


def _dress(axes: Axes) -> None:
    axes.grid(color=PALE, lw=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL, colors=INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(PALE)
