"""The result of a finetuning: metrics with their intervals, and a table to read."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_ray.evaluation.intervals import Interval, seeds_interval
from iwm_ray.finetuning.arms import Arm, ArmResult, Family
from iwm_ray.finetuning.data import Task
from iwm_ray.finetuning.experiment import by_family


def summarise(results: dict[Arm, ArmResult], tasks: dict[str, Task]) -> dict[str, Any]:
    """What RUN/finetune/NAME/summary.json holds.

    Returns:
        `metrics`: name -> number. For each task alone `finetune/<task>/top1` (predictor finetuning, mean over seeds)
        with `_low` and `_high` (95 % over test images), `top1_random_predictor` likewise, and `difference` of the two
        (95 % over test images and seeds, paired). What tunes the encoder, both, or all tasks together stands under
        `finetune/<task>/encoder/`, `.../both/` and `.../multitask/` instead; `multitask/minus_single` is the
        difference to the task alone. `finetune/<task>/chance` is the best constant answer.
        `efficiency`: one row for each family and task.
    """
    tables = dict(by_family(results))
    metrics: dict[str, float] = {}
    for name, task in tasks.items():
        metrics[f"finetune/{name}/chance"] = float(np.bincount(task.test.labels).max() / len(task.test))
    for family, found in tables.items():
        for task_name in family.tasks:
            prefix = _prefix(family, task_name)
            suffix = "_random_predictor" if family.start == "random" else ""
            metrics |= _interval(
                f"{prefix}/top1{suffix}", seeds_interval(rights(found, task_name), over_seeds=False)
            )
            if family.start == "pretrained":
                control = tables.get(Family(family.tune, "random", family.tasks))
                metrics |= _difference(f"{prefix}/difference", found, control, task_name)
            if len(family.tasks) > 1:
                alone = tables.get(Family(family.tune, family.start, (task_name,)))
                metrics |= _difference(f"{prefix}/minus_single{suffix}", found, alone, task_name)
    return {"metrics": metrics, "efficiency": list(_efficiency(results))}


def rights(results: list[ArmResult], task: str) -> NDArray[np.float64]:
    """`[s k]` 1 where the arm of seed s has classified test image k rightly."""
    return np.stack([result.rights(task) for result in results])


def lines(summary: dict[str, Any]) -> list[str]:
    """The summary as a table."""
    rows = [
        (
            row["task"],
            row["tune"] + (" (multi-task)" if row["multitask"] else ""),
            row["predictor"],
            f"{100 * row['top1']:.2f} ({100 * row['low']:.2f} to {100 * row['high']:.2f})",
            f"{100 * row['spread']:.2f}",
            f"{row['lr']:g}",
            f"{row['trained_parameters'] / 1e6:.2f}",
            f"{row['images_per_second']:,.0f} ({row['inputs']})",
            f"{row['peak_memory'] / 2**20:,.0f}",
        )
        for row in summary["efficiency"]
    ]
    head = ("task", "tuned", "predictor", "top-1 % (95 %)", "std", "lr", "M params", "images/s", "MiB")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *rows])
    table = ["  ".join(cells).rstrip() for cells in padded]
    return [*table, "", *_differences(summary["metrics"])]


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


def _prefix(family: Family, task: str) -> str:
    words = ["finetune", task]
    if len(family.tasks) > 1:
        words.append("multitask")
    if family.tune != "predictor":
        words.append(family.tune)
    return "/".join(words)


def _interval(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _difference(
    name: str, ours: list[ArmResult], theirs: list[ArmResult] | None, task: str
) -> dict[str, float]:
    """Our accuracy minus theirs, seed by seed and image by image; nothing where there is nothing to compare with."""
    if theirs is None:
        return {}
    return _interval(name, seeds_interval(rights(ours, task) - rights(theirs, task), over_seeds=True))


def _efficiency(results: dict[Arm, ArmResult]) -> Iterator[dict[str, Any]]:
    """Cost beside accuracy, the paper's figure as rows: means over seeds."""
    for family, found in by_family(results):
        for task in family.tasks:
            table = rights(found, task)
            interval = seeds_interval(table, over_seeds=False)
            yield {
                "task": task,
                "multitask": len(family.tasks) > 1,
                "tune": family.tune,
                "predictor": family.start,
                "lr": next(arm.lr for arm in results if arm.family == family),
                "seeds": [arm.seed for arm in results if arm.family == family],
                "top1": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "top1_by_seed": table.mean(1).tolist(),
                "spread": float(table.mean(1).std(ddof=1)) if len(table) > 1 else 0.0,
                "steps": found[0].steps,
                "trained_parameters": found[0].trained_parameters,
                "images_per_second": float(np.mean([result.images_per_second for result in found])),
                "peak_memory": max(result.peak_memory for result in found),
                "inputs": found[0].inputs,
            }
