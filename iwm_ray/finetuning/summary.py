"""The result of a finetuning: metrics with their intervals, and a table to read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_ray.evaluation.intervals import Interval, seeds_interval
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
        with `_low` and `_high` (95 % over test images), `top1_random_predictor` likewise, and `difference` of the two
        (95 % over test images and the seeds that both have, paired). What tunes the encoder, both, or all tasks
        together, or in an unusual way, stands under `finetune/<task>/encoder/`, `.../both/`, `.../multitask/`,
        `.../linear_head/` ... instead; `multitask/minus_single` is the difference to the task alone.
        `finetune/<task>/chance` is the best constant answer.
        `efficiency`: one row for each family and task.
    """
    tables = by_family(results)
    metrics: dict[str, float] = {}
    for name, task in tasks.items():
        metrics[f"finetune/{name}/chance"] = float(np.bincount(task.test.labels).max() / len(task.test))
    for family, found in tables.items():
        for task_name in family.tasks:

            def named(figure: str, family: Family = family, task_name: str = task_name) -> str:
                return figure_name(family, task_name, figure, ways)

            table = rights(found, found, task_name)
            metrics |= _interval(named("top1"), seeds_interval(table, over_seeds=False))
            if family.start == "pretrained":
                control = tables.get(Family(family.tune, "random", family.tasks), {})
                metrics |= _difference(named("difference"), found, control, task_name)
            if len(family.tasks) > 1:
                alone = tables.get(Family(family.tune, family.start, (task_name,)), {})
                metrics |= _difference(named("minus_single"), found, alone, task_name)
    return {"metrics": metrics, "efficiency": list(_efficiency(results))}


def rights(results: Seeds, seeds: Iterable[int], task: str) -> NDArray[np.float64]:
    """`[s k]` 1 where the arm of each of these seeds has classified test image k rightly."""
    return np.stack([results[seed].rights(task) for seed in seeds])


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary as a table."""
    return [*table_lines(summary["efficiency"], "top1", "top-1"), "", *_differences(summary["metrics"])]


def table_lines(rows: Iterable[Mapping[str, Any]], figure: str, label: str) -> list[str]:
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
            f"{100 * row['spread']:.2f}",
            f"{row['lr']:g}",
            f"{row['trained_parameters'] / 1e6:.2f}",
            f"{row['images_per_second']:,.0f} ({row['inputs']})",
            f"{row['peak_memory'] / 2**20:,.0f}",
        )
        for row in rows
    ]
    head = ("task", "tuned", "predictor", f"{label} % (95 %)", "std", "lr", "M params", "images/s", "MiB")
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *cells])
    return ["  ".join(line).rstrip() for line in padded]


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
        "spread": float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0,
        "trained_parameters": costs[0]["trained_parameters"],
        "images_per_second": float(np.mean([cost["images_per_second"] for cost in costs])),
        "peak_memory": max(cost["peak_memory"] for cost in costs),
        "inputs": costs[0]["inputs"],
    }


def _differences(metrics: dict[str, float]) -> Iterator[str]:
    for name, value in metrics.items():
        what = name.rpartition("/")[2]
        if not what.startswith(("difference", "minus_single")) or what.endswith(("_low", "_high")):
            continue
        low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
        words = "pretrained minus random predictor" if what == "difference" else "together minus alone"
        if what.endswith("_random_predictor"):
            words += ", random predictor"
        where = name.removeprefix("finetune/").rpartition("/")[0]
        yield f"{where}: {words} {100 * value:+.2f} points (95 %: {100 * low:+.2f} to {100 * high:+.2f})"


def _interval(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _difference(name: str, ours: Seeds, theirs: Seeds, task: str) -> dict[str, float]:
    """Our accuracy minus theirs, seed by seed and image by image; nothing where there is nothing to compare with."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return {}
    table = rights(ours, seeds, task) - rights(theirs, seeds, task)
    return _interval(name, seeds_interval(table, over_seeds=True))


def _efficiency(results: Mapping[Arm, ArmResult]) -> Iterator[dict[str, Any]]:
    """Cost beside accuracy, the paper's figure as rows: means over seeds."""
    for family, by_seed in by_family(results).items():
        arms = [arm for arm in results if arm.family == family]
        costs = [vars(results[arm]) for arm in arms]
        for task in family.tasks:
            table = rights(by_seed, by_seed, task)
            interval = seeds_interval(table, over_seeds=False)
            row = efficiency_row(arms, task, "top1", interval, table.mean(1).tolist(), costs)
            yield row | {"steps": costs[0]["steps"]}
