"""The map of a sweep: what a world model knows of its actions against what its representation is good for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

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
_FILLS = ("white", None, "black")  # None: the colour itself
_CLEARANCE = 6.0  # points between a label and the nearest mark


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
    fill: str
    """value of the axis that the marks' inside tells apart"""
    name: str = ""
    """written beside it"""


@dataclass(frozen=True)
class Key:
    """What a property of the marks means."""

    name: str
    """of an axis; empty: nothing"""
    values: tuple[str, ...]
    """in order"""


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
class EffectPanel:
    """What an axis does to one metric."""

    values: Mapping[str, Sequence[float]]
    """value of the axis -> figures of the configurations"""
    note: str
    """the largest difference, in words"""
    is_clear: bool = False
    """whether its interval leaves out 0"""


@dataclass(frozen=True)
class Row:
    """One metric."""

    title: str
    panels: tuple[EffectPanel, ...]
    """one for each axis"""
    unit: str = ""
    """of what is drawn, a hundredth of the figures; empty: the figures themselves"""


@dataclass(frozen=True)
class Bar:
    """A rank correlation, and the paper's."""

    name: str
    value: float
    low: float
    high: float
    paper: float | None
    count: int


def spectrum_map(panels: Sequence[Panel], chance: float, color: Key, marker: Key, fill: Key) -> Figure:
    """Draws MRR on x against each outcome in percent on y.

    Args:
        panels: in order, at most three in a row.
        chance: MRR by chance; NaN: not drawn.
        color: what colours mean.
        marker: what shapes mean.
        fill: what open and solid marks mean.
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
    looks = _Looks(color, marker, fill)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(grid[number // columns, number % columns])
        _draw_panel(axes, panel, chance, looks)
        if number >= len(panels) - columns:
            axes.set_xlabel("MRR", fontsize=TEXT, color=INK)
    _legends(figure, chance, looks)
    return figure


@dataclass(frozen=True)
class _Looks:
    """How marks look by the values of up to three axes."""

    color: Key
    marker: Key
    fill: Key

    def of(self, color: str, marker: str, fill: str, usual: str = BLUE) -> dict[str, Any]:
        """What `plot` takes; a value that is none of a key's, such as the empty one, looks the usual way."""
        shown = _look(color, self.color, _COLORS, usual)
        inside = _look(fill, self.fill, _FILLS if len(self.fill.values) > 1 else (None,), None)
        return {
            "marker": _look(marker, self.marker, _MARKERS, "o"),
            "color": shown,
            "mec": shown,
            "mfc": inside or shown,
        }


def _look(value: str, key: Key, looks: Sequence[Any], usual: Any) -> Any:
    return looks[key.values.index(value) % len(looks)] if value in key.values else usual


def _legends(figure: Figure, chance: float, looks: _Looks) -> None:
    """Keys in a row at the foot: what colours, shapes, fillings and lines mean."""
    marks = [
        Line2D([], [], color=GREY, marker="o", ls="", ms=3, alpha=0.6, label="one seed"),
        Line2D([], [], color=GREY, lw=1.2, label="95 % interval"),
    ]
    if np.isfinite(chance):
        marks.append(Line2D([], [], color=GREY, lw=1.2, ls="--", label="MRR by chance"))
    keys = {
        looks.color.name: [_handle(name, looks.of(name, "", "")) for name in looks.color.values],
        looks.marker.name: [_handle(name, looks.of("", name, "", INK)) for name in looks.marker.values],
        looks.fill.name: [_handle(name, looks.of("", "", name, INK)) for name in looks.fill.values],
        "marks": marks,
    }
    shown = {title: handles for title, handles in keys.items() if title and handles}
    for number, (title, handles) in enumerate(shown.items()):
        figure.legend(
            handles=handles, title=title, loc="upper center",
            bbox_to_anchor=((number + 0.5) / len(shown), 0.85 / figure.get_figheight()),
            ncol=2 if len(handles) > 3 else 1, fontsize=SMALL, title_fontsize=SMALL, frameon=False, labelcolor=INK,
            columnspacing=1.2,
        )  # fmt: skip


def _handle(name: str, look: dict[str, Any]) -> Line2D:
    return Line2D([], [], ls="", label=name, **look)


def _draw_panel(axes: Axes, panel: Panel, chance: float, looks: _Looks) -> None:
    if np.isfinite(chance):
        axes.axvline(chance, color=GREY, lw=1.2, ls="--", zorder=1)
    if panel.is_difference:
        axes.axhline(0, color=PALE, lw=1.2, zorder=0)
    for dot in panel.dots:
        look = looks.of(dot.color, dot.marker, dot.fill)
        for x, y in dot.seeds:
            axes.plot(x, 100 * y, "o", ms=3, color=look["color"], alpha=0.45, mew=0, zorder=2)
        axes.errorbar(
            dot.x, 100 * dot.y, xerr=_whiskers(dot.x, dot.x_range), yerr=100 * _whiskers(dot.y, dot.y_range),
            ms=6.5, mew=1.2, elinewidth=1.2, ecolor=look["color"], zorder=3, **look,
        )  # fmt: skip
    axes.set_title(panel.title, fontsize=HEADING, fontweight="bold", color=INK, loc="left", pad=17)
    axes.text(0, 1.02, panel.note, transform=axes.transAxes, fontsize=SMALL, color=GREY, va="bottom")
    axes.set_ylabel("points" if panel.is_difference else "top-1, %", fontsize=TEXT, color=INK)
    axes.margins(0.09)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    _dress(axes)
    _name_dots(axes, panel.dots)


def _name_dots(axes: Axes, dots: Sequence[Dot]) -> None:
    """Writes the names of dots where there is room, with a line to the dot."""
    axes.autoscale_view()

    def in_points(places: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
        return np.asarray(axes.transData.transform(places)) * 72 / DPI

    frame = np.asarray(axes.get_window_extent().get_points()) * 72 / DPI
    taken = in_points([place for dot in dots for place in _places(dot)])
    centres = in_points([(dot.x, 100 * dot.y) for dot in dots])
    for dot, here in zip(dots, centres, strict=True):
        if not dot.name:
            continue
        size = np.array([0.6 * SMALL * len(dot.name), 1.2 * SMALL])
        offset = _room(here, size, frame, taken, centres[(centres != here).any(1)])
        axes.annotate(
            dot.name, (dot.x, 100 * dot.y), xytext=(offset[0], offset[1]), textcoords="offset points",
            fontsize=SMALL, color=INK, ha="center", va="center", zorder=5,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.7, "shrinkA": 1, "shrinkB": 5},
        )  # fmt: skip
        taken = np.concatenate([taken, here + offset + size * np.linspace((-0.5, 0), (0.5, 0), 9)])


def _room(
    here: NDArray[np.float64],
    size: NDArray[np.float64],
    frame: NDArray[np.float64],
    taken: NDArray[np.float64],
    others: NDArray[np.float64],
) -> NDArray[np.float64]:
    """`[2]` points from a dot to the middle of its label: inside the frame, on nothing else, near, its line past others.

    Args:
        here: `[2]` the dot.
        size: `[2]` of the label.
        frame: `[2 2]` lower left and upper right corner.
        taken: `[n 2]` what may not be written on.
        others: `[m 2]` the other dots.
    """
    best, offset = -np.inf, np.zeros(2)
    # Not straight along the whiskers, where the line would not be seen.
    for distance, angle in product(range(14, 140, 6), (np.arange(48) + 0.5) * np.pi / 24):
        tried = (distance + size / 2) * (np.cos(angle), np.sin(angle))
        low, high = here + tried - size / 2, here + tried + size / 2
        if (low < frame[0]).any() or (high > frame[1]).any():
            continue
        gaps = np.maximum(0, np.maximum(low - taken, taken - high))
        room = min(_CLEARANCE, float(np.hypot(*gaps.T).min())) - distance / 1000
        line = here + tried * np.linspace(0, 1, 30)[:, None]
        near = (np.hypot(*(line[:, None] - others).T) < _CLEARANCE).any(0)
        room -= 0.5 * float(near.mean() * np.hypot(*tried))
        if room > best:
            best, offset = room, tried
    return offset


def _places(dot: Dot) -> list[tuple[float, float]]:
    """Where a dot, its seeds and its whiskers lie."""
    (left, right), (below, above) = _whiskers(dot.x, dot.x_range)[:, 0], _whiskers(dot.y, dot.y_range)[:, 0]
    across = [(x, 100 * dot.y) for x in np.linspace(dot.x - left, dot.x + right, 17)]
    along = [(dot.x, 100 * y) for y in np.linspace(dot.y - below, dot.y + above, 17)]
    return [*across, *along, (dot.x, 100 * dot.y), *((x, 100 * y) for x, y in dot.seeds)]


def _whiskers(value: float, ends: Range) -> NDArray[np.float64]:
    """`[2 1]` lengths below and above; 0 where unknown."""
    low, high = ends
    return np.nan_to_num([[max(0.0, value - low)], [max(0.0, high - value)]])


def effect_grid(axes_names: Sequence[str], rows: Sequence[Row]) -> Figure:
    """Draws, for each axis (columns) and metric (rows), the figures of the configurations with each value, and their mean.

    Args:
        axes_names: of the columns.
        rows: of as many panels each.
    """
    width, height = max(5.0, 2.9 * len(axes_names) + 0.9), 2.3 * len(rows) + 0.9
    figure = Figure(figsize=(width, height), dpi=DPI)
    grid = figure.add_gridspec(
        len(rows), len(axes_names), left=0.8 / width, right=1 - 0.2 / width, top=1 - 0.35 / height,
        bottom=0.75 / height, wspace=0.12, hspace=0.24,
    )  # fmt: skip
    for number, row in enumerate(rows):
        first: Axes | None = None
        for column, (name, panel) in enumerate(zip(axes_names, row.panels, strict=True)):
            axes = figure.add_subplot(grid[number, column], sharey=first)
            _draw_effect(axes, panel, 100 if row.unit else 1)
            if first is None:
                first = axes
                axes.set_ylabel(", ".join(filter(None, (row.title, row.unit))), fontsize=TEXT, color=INK)
            else:
                axes.tick_params(labelleft=False)
            if number == len(rows) - 1:
                axes.set_xlabel(name, fontsize=TEXT, color=INK)
            else:
                axes.tick_params(labelbottom=False)
    return figure


def _draw_effect(axes: Axes, panel: EffectPanel, scale: float) -> None:
    figures = [scale * np.asarray(found) for found in panel.values.values()]
    places = np.arange(len(figures))
    for place, found in zip(places, figures, strict=True):
        shift = np.linspace(-0.12, 0.12, len(found)) if len(found) > 1 else np.zeros(1)
        axes.plot(place + shift, found, "o", ms=3.5, color=SKY, mew=0, alpha=0.8, zorder=2)
    axes.plot(places, [found.mean() for found in figures], "o-", color=BLUE, ms=6, lw=1.5, zorder=3)
    weight = "bold" if panel.is_clear else "normal"
    axes.set_title(
        panel.note, fontsize=SMALL, color=INK if panel.is_clear else GREY, fontweight=weight, loc="left"
    )
    axes.set_xticks(places, list(panel.values))
    axes.set_xlim(-0.5, max(1, len(places)) - 0.5)
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
            text = f"{value:.3f}" if np.isfinite(value) else "–"
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
