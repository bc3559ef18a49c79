"""Training curves: one small panel a quantity, step on x."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from iwm_ray.pictures.style import BLUE, DPI, GREY, HEADING, INK, ORANGE, PALE, SMALL, TEXT, TITLE

Rows = Sequence[Mapping[str, Any]]
"""lines of metrics.jsonl: `step` and metric name -> number, or None where it was not finite"""

_COLUMNS = 3
_DOTS_UP_TO = 40  # readings; more of them make a line of dots unreadable


@dataclass(frozen=True)
class Panel:
    """One quantity: metric name, what it is called, and what it is compared with."""

    metric: str
    title: str
    reference: str = ""
    reference_label: str = ""
    scale: Literal["fitted", "from zero", "log"] = "fitted"


PANELS = (
    Panel("train/loss", "Training loss", "monitor/loss", "on the fixed monitor batch"),
    Panel("train/lr", "Learning rate"),
    Panel("train/momentum", "EMA momentum of the target encoder"),
    Panel("train/weight_decay", "Weight decay"),
    Panel("train/grad_norm", "Gradient norm", scale="log"),
    Panel("monitor/rankme", "RankMe of the target features"),
    Panel("monitor/target_std", "Spread (std) of the target features"),
    Panel("monitor/cosine", "Cosine of prediction and target"),
    Panel("monitor/action_gap", "Action gap (shuffled minus true loss)"),
    Panel("monitor/knn_top1", "kNN top-1", "monitor/knn_chance", "best constant answer", scale="from zero"),
    Panel("train/samples_per_second", "Images per second", scale="from zero"),
    Panel("train/data_wait_fraction", "Share of time waiting for data", scale="from zero"),
)


def training_curves(rows: Rows, title: str = "Training curves") -> Figure:
    """Draws small multiples of whatever the rows hold.

    Args:
        rows: in any order; a row need not hold every metric. Values that are not finite are left out and counted in
            the panel's title.
        title: above the panels.

    Returns:
        A figure with one axes for each quantity that was seen, or a single axes saying that there was none.
    """
    panels = [panel for panel in PANELS if any(panel.metric in row for row in rows)]
    lines = max(1, math.ceil(len(panels) / _COLUMNS))
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, hspace=0.04, wspace=0.03)
    figure = Figure(figsize=(12, 0.8 + 2.3 * lines), dpi=DPI, layout=layout)
    figure.suptitle(title, fontsize=TITLE, color=INK, x=0.01, ha="left", fontweight="bold")
    if not panels:
        axes = figure.add_subplot()
        axes.text(0.5, 0.5, "no metrics yet", ha="center", va="center", fontsize=TEXT, color=GREY)
        axes.set_axis_off()
        return figure
    last = max(row["step"] for row in rows)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(lines, _COLUMNS, number + 1)
        _draw(axes, panel, rows, last)
        if number + _COLUMNS >= len(panels):
            axes.set_xlabel("step", fontsize=SMALL, color=GREY)
    return figure


def _draw(axes: Axes, panel: Panel, rows: Rows, last: float) -> None:
    steps, values, num_bad = _series(rows, panel.metric)
    marker = "o" if len(steps) <= _DOTS_UP_TO else ""
    axes.plot(steps, values, color=BLUE, linewidth=1.4, marker=marker, markersize=3)
    if panel.reference:
        others, heights, _ = _series(rows, panel.reference)
        if others:
            axes.plot(
                others, heights, color=ORANGE, linewidth=1.4, linestyle="--", label=panel.reference_label
            )
            axes.legend(fontsize=SMALL, frameon=False, labelcolor=GREY, handlelength=1.8)
    note = f"  ({num_bad} not finite)" if num_bad else ""
    axes.set_title(panel.title + note, fontsize=HEADING, color=INK, loc="left")
    _set_scale(axes, panel, values)
    axes.set_xlim(0, max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.tick_params(which="both", labelsize=SMALL, colors=GREY, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PALE)


def _set_scale(axes: Axes, panel: Panel, values: Sequence[float]) -> None:
    if panel.scale == "log" and values and min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if panel.scale == "from zero":
        axes.set_ylim(bottom=0)


def _series(rows: Rows, metric: str) -> tuple[list[float], list[float], int]:
    """Steps and finite values of a metric in order of the steps, and how many values were not finite."""
    points = [(row["step"], row[metric]) for row in rows if metric in row]
    finite = sorted((step, value) for step, value in points if value is not None and math.isfinite(value))
    return [step for step, _ in finite], [value for _, value in finite], len(points) - len(finite)
