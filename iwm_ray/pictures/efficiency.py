"""What a finetuning buys: accuracy against trained parameters (the paper's figure), memory and speed, a line a task."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from iwm_ray.pictures.style import BLUE, DPI, GREEN, GREY, HEADING, INK, ORANGE, PALE, SMALL, TEXT, TITLE

_COLOURS = {"pretrained": BLUE, "random": ORANGE, "none": GREEN}
_WORDS = {"pretrained": "pretrained predictor", "random": "random predictor", "none": "no predictor"}
# Points sideways, alone and multi-task: what trains the same parameters must not hide one another.
_ASIDE = {"pretrained": (-4, -12), "random": (4, 12), "none": (0, 8)}
_COSTS = {
    "trained_parameters": ("trained parameters, millions", 1e6),
    "peak_memory": ("memory to train, MiB", 2**20),
    "images_per_second": ("images/s in training", 1),
}
_FROM_TOKENS = ", predictor alone: cached tokens"


def accuracy_against_cost(
    rows: Sequence[Mapping[str, Any]], title: str, figure_name: str = "top1", label: str = "top-1"
) -> Figure:
    """Draws the rows of a summary (`efficiency`).

    Args:
        rows: `task`, `tune`, `predictor`, `multitask`, `inputs`, the costs `trained_parameters`, `peak_memory` (bytes) and
            `images_per_second`, the figure with `low` and `high` (0..1).
        title: above the panels.
        figure_name: the figure's name in the rows.
        label: its name for a person.

    Returns:
        A figure with one line of three axes for each task, which share the height; bars are 95 % intervals, squares are
        multi-task. What costs the same stands side by side: pretrained predictors four points left of their cost, random
        ones right, multi-task eight further.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(10.8, 1.3 + 2.6 * len(tasks)), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=TITLE, color=INK)
    grid = figure.subplots(len(tasks), len(_COSTS), sharey="row", squeeze=False)
    for task, line in zip(tasks, grid, strict=True):
        own = [row for row in rows if row["task"] == task]
        line[0].set_ylabel(f"{label}, %", fontsize=TEXT, color=INK)
        line[0].set_title(task, loc="left", fontsize=HEADING, color=INK)
        for axes, cost in zip(line, _COSTS, strict=True):
            _panel(axes, own, figure_name, cost)
    for axes, cost in zip(grid[-1], _COSTS, strict=True):
        cached = cost == "images_per_second" and any(row["inputs"] == "tokens" for row in rows)
        axes.set_xlabel(_COSTS[cost][0] + _FROM_TOKENS * cached, fontsize=TEXT, color=INK)
    handles = {
        label: line
        for axes in grid[:, 0]
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False
    )
    return figure


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], figure_name: str, cost: str) -> None:
    for row in rows:
        colour, height, place = (
            _COLOURS[row["predictor"]],
            100 * row[figure_name],
            row[cost] / _COSTS[cost][1],
        )
        low, high = 100 * row["low"], 100 * row["high"]
        points = _ASIDE[row["predictor"]][row["multitask"]]
        aside = ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)
        axes.errorbar(
            place,
            height,
            yerr=[[height - low], [high - height]],
            fmt="s" if row["multitask"] else "o",
            color=colour,
            capsize=3,
            label=f"{row['tune']} tuned, {_WORDS[row['predictor']]}"
            + (", multi-task" if row["multitask"] else ""),
            markerfacecolor=colour if row["tune"] == "predictor" else "none",
            markersize=9 if row["tune"] == "both" else 6,
            transform=axes.transData + aside,
        )
        axes.update_datalim([(place, low), (place, high)])
    axes.margins(y=0.15)
    axes.autoscale_view()
    most = max(row[cost] for row in rows) / _COSTS[cost][1]
    axes.set_xlim(-0.06 * most, 1.15 * most)  # with 0, so that a small difference of costs looks small
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(labelsize=SMALL, colors=GREY)
    axes.grid(color=PALE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
