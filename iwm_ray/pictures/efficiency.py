"""What a finetuning buys: accuracy against trained parameters, one panel a task (the paper's figure)."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from iwm_ray.pictures.style import BLUE, DPI, GREEN, GREY, HEADING, INK, ORANGE, PALE, SMALL, TEXT, TITLE

_COLUMNS = 3
_COLOURS = {"pretrained": BLUE, "random": ORANGE, "none": GREEN}
_WORDS = {"pretrained": "pretrained predictor", "random": "random predictor", "none": "no predictor"}


def accuracy_against_parameters(
    rows: Sequence[Mapping[str, Any]], title: str, figure_name: str = "top1", label: str = "top-1"
) -> Figure:
    """Draws the rows of a summary (`efficiency`).

    Args:
        rows: `task`, `tune`, `predictor`, `multitask`, `trained_parameters`, the figure with `low` and `high` (0..1).
        title: above the panels.
        figure_name: the figure's name in the rows.
        label: its name for a person.

    Returns:
        A figure with one axes for each task; bars are 95 % intervals, squares are multi-task.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(_COLUMNS, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(max(5.4, 4.2 * columns), 0.9 + 3.2 * lines), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=TITLE, color=INK)
    for number, task in enumerate(tasks, start=1):
        axes = figure.add_subplot(lines, columns, number)
        _panel(axes, [row for row in rows if row["task"] == task], figure_name)
        axes.set_ylabel(f"{label}, %", fontsize=TEXT, color=INK)
        axes.set_title(task, loc="left", fontsize=HEADING, color=INK)
    handles = {
        label: line
        for axes in figure.axes
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=SMALL, frameon=False
    )
    return figure


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], figure_name: str) -> None:
    for row in rows:
        colour, height = _COLOURS[row["predictor"]], 100 * row[figure_name]
        axes.errorbar(
            row["trained_parameters"] / 1e6,
            height,
            yerr=[[height - 100 * row["low"]], [100 * row["high"] - height]],
            fmt="s" if row["multitask"] else "o",
            color=colour,
            capsize=3,
            label=f"{row['tune']} tuned, {_WORDS[row['predictor']]}"
            + (", multi-task" if row["multitask"] else ""),
            markerfacecolor=colour if row["tune"] == "predictor" else "none",
            markersize=9 if row["tune"] == "both" else 6,
        )
    axes.set_xlabel("trained parameters, millions", fontsize=TEXT, color=INK)
    axes.margins(x=0.15, y=0.15)
    axes.tick_params(labelsize=SMALL, colors=GREY)
    axes.grid(color=PALE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
