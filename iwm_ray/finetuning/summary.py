"""The result of a finetuning: metrics with their intervals, and a table to read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_ray.evaluation.intervals import Floats, Interval, seeds_interval
from iwm_ray.finetuning.arms import Arm, ArmResult, Family, by_family, figure_name
from iwm_ray.finetuning.data import Task

Seeds = Mapping[int, ArmResult]
"""seed -> result, of one family"""


def summarise(
    results: Mapping[Arm, ArmResult], tasks: Mapping[str, Task], ways: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What RUN/finetune/NAME/summary.json holds.

    Args:
        results: of all arms that are there.
        tasks: by name.
        ways: see TuningConfig.

    Returns:
        `metrics`: name -> number. For each task alone `finetune/<task>/top1` (predictor finetuning, mean over seeds)
        with `_low` and `_high` (95 %, see `seeds_interval`), `top1_random_predictor` likewise, and `difference` of the
        two (paired, of the seeds that both have). What tunes the encoder, both, or all tasks
        together, or in an unusual way, stands under `finetune/<task>/encoder/`, `.../both/`, `.../multitask/`,
        `.../linear_head/` ... instead; `multitask/minus_single` is the difference to the task alone.
        `finetune/<task>/chance` is the best constant answer.
        `num_seeds`: of each figure with an interval; of one seed that is over test images alone.
        `efficiency`: one row for each family and task.
    """
    tables = by_family(results)
    metrics: dict[str, float] = {}
    num_seeds: dict[str, int] = {}
    for name, task in tasks.items():
        labels = task.test.judged_labels
        metrics[f"finetune/{name}/chance"] = float(np.bincount(labels).max() / len(labels))
    for family, found in tables.items():
        for task_name in family.tasks:
            figures = {"top1": (rights(found, found, task_name), 0.0)}
            if family.start == "pretrained":
                control = tables.get(Family(family.tune, "random", family.tasks), {})
                figures |= _difference("difference", found, control, task_name)
            if len(family.tasks) > 1:
                alone = tables.get(Family(family.tune, family.start, (task_name,)), {})
                figures |= _difference("minus_single", found, alone, task_name)
            for figure, (table, lowest) in figures.items():
                figure_named = figure_name(family, task_name, figure, ways)
                metrics |= interval_metrics(figure_named, seeds_interval(table, lowest))
                num_seeds[figure_named] = len(table)
    return {"metrics": metrics, "num_seeds": num_seeds, "efficiency": list(_efficiency(results))}


def rights(results: Seeds, seeds: Iterable[int], task: str) -> NDArray[np.float64]:
    """`[s k]` 1 where the arm of each of these seeds has classified test image k rightly."""
    return np.stack([results[seed].rights(task) for seed in seeds])


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary as a table."""
    table = table_lines(summary["efficiency"], "top1", "top-1")
    return [*table, "", *sentences(summary, "every image of the most frequent class")]


def table_lines(rows: Sequence[Mapping[str, Any]], figure: str, label: str) -> list[str]:
    """Score and cost of each network (see `efficiency_row`).

    Args:
        rows: of the networks.
        figure: name of the score in the rows.
        label: its name for a person.
    """
    cells = [
        (
            row["task"],
            row["tune"] + (" (multi-task)" if row["multitask"] else ""),
            row["predictor"],
            f"{100 * row[figure]:.2f} ({100 * row['low']:.2f} to {100 * row['high']:.2f})",
            "-" if row["spread"] is None else f"{100 * row['spread']:.2f}",
            f"{row['lr']:g}",
            f"{row['trained_parameters'] / 1e6:.2f}",
            f"{row['images_per_second']:,.0f} ({row['inputs']})",
            f"{row['peak_memory'] / 2**20:,.0f}",
        )
        for row in rows
    ]
    head = (
        "task",
        "tuned",
        "predictor",
        f"{label} % (95 %)",
        "std",
        "lr",
        "M params",
        "images/s",
        "MiB to train",
    )
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *cells])
    note = ["std -: one seed, 95 % over test images alone"] * any(row["spread"] is None for row in rows)
    return ["  ".join(line).rstrip() for line in padded] + note


def efficiency_row(
    arms: Sequence[Arm],
    task: str,
    figure: str,
    interval: Interval,
    scores: Sequence[float],
    costs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Cost beside score, the paper's figure as a row: means over seeds.

    Args:
        arms: of one family.
        task: on which they were judged.
        figure: name of the score.
        interval: of its mean.
        scores: of each arm, 0 to 1.
        costs: of each arm: `trained_parameters`, `images_per_second`, `peak_memory`, `inputs` (see ArmResult).
    """
    first = arms[0]
    return {
        "task": task,
        "multitask": len(first.tasks) > 1,
        "tune": first.tune,
        "predictor": first.start,
        "lr": first.lr,
        "seeds": [arm.seed for arm in arms],
        figure: interval.mean,
        "low": interval.low,
        "high": interval.high,
        f"{figure}_by_seed": list(scores),
        "spread": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
        "trained_parameters": costs[0]["trained_parameters"],
        "images_per_second": float(np.mean([cost["images_per_second"] for cost in costs])),
        "peak_memory": max(cost["peak_memory"] for cost in costs),
        "inputs": costs[0]["inputs"],
    }


_COMPARED = {
    "difference": "pretrained minus random predictor",
    "miou_difference": "pretrained minus random predictor",
    "minus_single": "together minus alone",
    "minus_single_random_predictor": "together minus alone, random predictor",
}


def sentences(summary: Mapping[str, Any], chance: str) -> Iterator[str]:
    """What is said below the table: chance, and every difference.

    Args:
        summary: see `summarise`.
        chance: what is right by chance, in words.
    """
    for name, value in summary["metrics"].items():
        where, _, what = name.removeprefix("finetune/").rpartition("/")
        if what in ("chance", "miou_chance"):
            yield f"{where}: chance {100 * value:.2f} % ({chance})"
        elif what in _COMPARED:
            ends = _ends_of_difference(summary, name)
            yield f"{where}: {_COMPARED[what]} {100 * value:+.2f} points ({ends})"


def _ends_of_difference(summary: Mapping[str, Any], name: str) -> str:
    """`95 %: -1.20 to +3.40`, in points; of one seed it says over what it is."""
    low, high = (100 * summary["metrics"][f"{name}_{end}"] for end in ("low", "high"))
    over = ", over test images, one seed" * (summary["num_seeds"][name] == 1)
    return f"95 %{over}: {low:+.2f} to {high:+.2f}"


def interval_metrics(name: str, interval: Interval) -> dict[str, float]:
    """The mean as `<name>`, the ends as `<name>_low` and `<name>_high`."""
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _difference(name: str, ours: Seeds, theirs: Seeds, task: str) -> dict[str, tuple[Floats, float]]:
    """Our accuracy minus theirs, seed by seed and image by image, with the lowest that it could be; nothing where there is
    nothing to compare with."""
    seeds = [seed for seed in ours if seed in theirs]
    return {name: (rights(ours, seeds, task) - rights(theirs, seeds, task), -1.0)} if seeds else {}


def _efficiency(results: Mapping[Arm, ArmResult]) -> Iterator[dict[str, Any]]:
    """Cost beside accuracy, the paper's figure as rows: means over seeds."""
    for family, by_seed in by_family(results).items():
        arms = [arm for arm in results if arm.family == family]
        costs = [vars(results[arm]) for arm in arms]
        for task in family.tasks:
            table = rights(by_seed, by_seed, task)
            interval = seeds_interval(table)
            row = efficiency_row(arms, task, "top1", interval, table.mean(1).tolist(), costs)
            yield row | {"steps": costs[0]["steps"]}
