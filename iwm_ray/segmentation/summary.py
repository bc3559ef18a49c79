"""Intersection over union, with 95 % intervals over test images and seeds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_ray.evaluation.intervals import Floats, Interval, named
from iwm_ray.finetuning.arms import Arm, Family, figure_name
from iwm_ray.finetuning.summary import efficiency_row, interval_metrics, sentences, table_lines

Counts = Mapping[Family, Mapping[int, NDArray[np.int64]]]
"""`[k 3 c]` of each family and seed (see network.measure)"""


def class_iou(counts: NDArray[np.number], weights: Floats) -> Floats:
    """`[k 3 c]` counts and `[k]` weights of the images -> `[c]`; NaN for a class that no image has or predicts.

    Images without a class say nothing of it: where those of weight 0 are the only ones that have it, it is that of all
    images. (Left out, a rare and hard class would raise the mean of many a resample.)
    """
    weighted = np.tensordot(weights, counts, 1)
    right, predicted, there = np.where(weighted[2] > 0, weighted, counts.sum(0))
    union = predicted + there - right
    return np.divide(right, union, out=np.full(len(right), np.nan), where=union > 0)


def miou(counts: NDArray[np.number], weights: Floats, classes: NDArray[np.bool_]) -> float:
    """Mean over the `[c]` classes that are chosen; some image has each of them."""
    return float(class_iou(counts, weights)[classes].mean())


def miou_of_present(counts: NDArray[np.number]) -> float:
    """Mean over the classes that the images have."""
    return miou(counts, np.ones(len(counts)), counts[:, 2].sum(0) > 0)


def constant_counts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[k 3 c]` of the best constant answer: every pixel of the most frequent class."""
    there = counts[:, 2]
    best = int(there.sum(0).argmax())
    found = np.zeros_like(counts)
    found[:, 0, best], found[:, 1, best], found[:, 2] = there[:, best], there.sum(1), there
    return found


def summarise(
    counts: Counts, class_names: Sequence[str], task: str, ways: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What summary.json holds.

    Args:
        counts: of every family.
        class_names: of the pixels.
        task: name of the data.
        ways: see TuningConfig.

    Returns:
        `metrics`: `finetune/<task>/miou` (predictor tuned; `encoder/miou`, `both/miou`, `linear_head/miou` ... otherwise),
        `miou_random_predictor` and `miou_difference` of the two, means over seeds (over those that both have) with
        `_low` and `_high` (95 %: the wider of over test images and Student's t over seeds);
        `finetune/<task>/miou_chance` of the best constant answer; classes that no test image has are left out.
        `num_seeds`: of each figure with an interval; of one seed that is over test images alone. `classes`: one row for
        each family and class of the first seed, over test images.
    """
    columns = _columns(counts, task, ways)
    first = _first(next(iter(counts.values())))
    present = first[:, 2].sum(0) > 0

    def by_seed(weights: Floats) -> list[list[float]]:
        found = {
            family: {seed: miou(each, weights, present) for seed, each in arms.items()}
            for family, arms in counts.items()
        }
        return [
            [sum(sign * found[family][seed] for family, sign in signs) for seed in seeds]
            for seeds, signs in columns.values()
        ]

    def statistic(weights: Floats) -> Floats:
        return np.array([np.mean(values) for values in by_seed(weights)])

    metrics = named(tuple(columns), statistic, len(first), 0)
    for (name, (_, signs)), values in zip(columns.items(), by_seed(np.ones(len(first))), strict=True):
        over_images = Interval(metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"])
        metrics |= interval_metrics(name, over_images.over_seeds(values, 1.0 - len(signs)))
    chance = miou(constant_counts(first), np.ones(len(first)), present)
    metrics[f"finetune/{task}/miou_chance"] = chance
    num_seeds = {name: len(seeds) for name, (seeds, _) in columns.items()}
    rows = list(_class_rows(counts, class_names, present))
    return {"metrics": metrics, "num_seeds": num_seeds, "classes": rows}


Column = tuple[list[int], list[tuple[Family, int]]]
"""the mean over some seeds of a signed sum of families"""


def _columns(counts: Counts, task: str, ways: tuple[str, ...]) -> dict[str, Column]:
    """What each figure is."""
    columns: dict[str, Column] = {}
    for family, found in counts.items():
        columns[figure_name(family, task, "miou", ways)] = list(found), [(family, 1)]
        control = Family(family.tune, "random", family.tasks)
        shared = [seed for seed in found if seed in counts.get(control, {})]
        if family.start == "pretrained" and shared:
            signs = [(family, 1), (control, -1)]
            columns[figure_name(family, task, "miou_difference", ways)] = shared, signs
    return columns


def _first(by_seed: Mapping[int, NDArray[np.int64]]) -> NDArray[np.int64]:
    return by_seed[min(by_seed)]


def _class_rows(
    counts: Counts, class_names: Sequence[str], present: NDArray[np.bool_]
) -> Iterator[dict[str, Any]]:
    for family, found in counts.items():
        first = _first(found)

        def statistic(weights: Floats, first: NDArray[np.int64] = first) -> Floats:
            return class_iou(first, weights)[present]

        seen = {number: class_names[number] for number in np.flatnonzero(present).tolist()}
        figures = named(tuple(seen.values()), statistic, len(first), 0)
        for number, name in seen.items():
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


def efficiency(
    costs: Mapping[Arm, Mapping[str, Any]],
    counts: Counts,
    metrics: Mapping[str, float],
    ways: tuple[str, ...],
) -> list[dict[str, Any]]:
    """One row of score and cost for each family (see finetuning.summary.efficiency_row)."""
    rows = []
    for family, found in counts.items():
        arms = [arm for arm in costs if arm.family == family]
        name = figure_name(family, arms[0].tasks[0], "miou", ways)
        interval = Interval(metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"])
        scores = [miou_of_present(found[arm.seed]) for arm in arms]
        rows.append(
            efficiency_row(arms, arms[0].tasks[0], "miou", interval, scores, [costs[arm] for arm in arms])
        )
    return rows


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary as tables."""
    found = [*table_lines(summary["efficiency"], "miou", "mIoU"), ""]
    found += sentences(summary, "every pixel of the most frequent class")
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
