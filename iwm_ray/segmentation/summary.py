"""Intersection over union, with 95 % intervals over the test images."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_ray.evaluation.intervals import Floats, named
from iwm_ray.finetuning.arms import Family

Counts = Mapping[Family, NDArray[np.int64]]
"""`[s k 3 c]` of the seeds of each family (see network.measure)"""


def class_iou(counts: NDArray[np.number], weights: Floats) -> Floats:
    """`[k 3 c]` counts and `[k]` weights of the images -> `[c]`; NaN for a class that no image has or predicts."""
    right, predicted, there = np.tensordot(weights, counts, 1)
    union = predicted + there - right
    return np.divide(right, union, out=np.full(len(right), np.nan), where=union > 0)


def miou(counts: NDArray[np.number], weights: Floats, classes: NDArray[np.bool_]) -> float:
    """Mean over those of the `[c]` classes that these images have or predict."""
    return float(np.nanmean(class_iou(counts, weights)[classes]))


def constant_counts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[k 3 c]` of the best constant answer: every pixel of the most frequent class."""
    there = counts[:, 2]
    best = int(there.sum(0).argmax())
    found = np.zeros_like(counts)
    found[:, 0, best], found[:, 1, best], found[:, 2] = there[:, best], there.sum(1), there
    return found


def summarise(counts: Counts, class_names: Sequence[str], task: str) -> dict[str, Any]:
    """What summary.json holds.

    Args:
        counts: of every family.
        class_names: of the pixels.
        task: name of the data.

    Returns:
        `metrics`: `finetune/<task>/miou` (predictor tuned; `encoder/miou`, `both/miou` otherwise),
        `miou_random_predictor` and `difference` of the two, means over seeds with `_low` and `_high` (95 % over test
        images, the seeds as they are); `finetune/<task>/miou_chance` of the best constant answer; classes that no
        test image has are left out. `classes`: one row for each family and class of the first seed.
    """
    names, columns = _columns(counts, task)
    first = next(iter(counts.values()))[0]
    present = first[:, 2].sum(0) > 0

    def statistic(weights: Floats) -> Floats:
        means = {
            family: float(np.mean([miou(each, weights, present) for each in found]))
            for family, found in counts.items()
        }
        return np.array([sum(sign * means[family] for family, sign in column) for column in columns])

    metrics = named(names, statistic, len(first), 0)
    chance = miou(constant_counts(first), np.ones(len(first)), present)
    metrics[f"finetune/{task}/miou_chance"] = chance
    return {"metrics": metrics, "classes": list(_class_rows(counts, class_names, present))}


def _columns(counts: Counts, task: str) -> tuple[tuple[str, ...], list[list[tuple[Family, int]]]]:
    """Names of the figures, and the signed sum of families that each of them is."""
    columns: dict[str, list[tuple[Family, int]]] = {}
    for family in counts:
        prefix = f"finetune/{task}" + ("" if family.tune == "predictor" else f"/{family.tune}")
        suffix = "_random_predictor" if family.start == "random" else ""
        columns[f"{prefix}/miou{suffix}"] = [(family, 1)]
        control = Family(family.tune, "random", family.tasks)
        if family.start == "pretrained" and control in counts:
            columns[f"{prefix}/miou_difference"] = [(family, 1), (control, -1)]
    return tuple(columns), list(columns.values())


def _class_rows(
    counts: Counts, class_names: Sequence[str], present: NDArray[np.bool_]
) -> Iterator[dict[str, Any]]:
    for family, found in counts.items():
        first = found[0]

        def statistic(weights: Floats, first: NDArray[np.int64] = first) -> Floats:
            # A resample without the class says nothing of it: zero for a class that is never predicted either.
            return np.nan_to_num(class_iou(first, weights))

        figures = named(tuple(class_names), statistic, len(first), 0)
        for number, name in enumerate(class_names):
            if present[number]:
                yield {
                    "tune": family.tune,
                    "predictor": family.start,
                    "class": name,
                    "images": int((first[:, 2, number] > 0).sum()),
                    "pixels": float(first[:, 2, number].sum() / first[:, 2].sum()),
                    "iou": figures[name],
                    "low": figures[f"{name}_low"],
                    "high": figures[f"{name}_high"],
                }


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary as tables."""
    metrics = summary["metrics"]
    found = []
    for name, value in metrics.items():
        if name.endswith(("_low", "_high")):
            continue
        between = ""
        if f"{name}_low" in metrics:
            between = f" (95 %: {100 * metrics[f'{name}_low']:.2f} to {100 * metrics[f'{name}_high']:.2f})"
        found.append(f"{name.removeprefix('finetune/')}  {100 * value:.2f} %{between}")
    families = dict.fromkeys((row["tune"], row["predictor"]) for row in summary["classes"])
    heads = [f"{tune}, {predictor}" for tune, predictor in families]
    width = max(len(row["class"]) for row in summary["classes"])
    found += ["", " " * width + "  pixels  " + "  ".join(head.ljust(24) for head in heads).rstrip()]
    by_class: dict[str, list[Mapping[str, Any]]] = {}
    for row in summary["classes"]:
        by_class.setdefault(row["class"], []).append(row)
    for name, rows in by_class.items():
        cells = [
            f"{100 * row['iou']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})".ljust(24)
            for row in rows
        ]
        found.append(f"{name.ljust(width)}  {100 * rows[0]['pixels']:5.1f}%  {'  '.join(cells).rstrip()}")
    return found
