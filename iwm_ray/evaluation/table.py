"""The figures of an evaluation as lines of text: a row a figure, a column a subject, chance beside them."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Measured = Mapping[str, Mapping[str, float]]
"""subject -> metric -> value"""

_NAMES = {
    "mrr/mrr": "MRR",
    "mrr/adjusted": "MRR, chance-adjusted",
    "mrr/h1": "true view ranked first",
    "mrr/h5": "true view among the first five",
    "mrr/h10": "true view among the first ten",
    "mrr/zero_action": "MRR with the null action",
    "mrr/shuffled_action": "MRR with another view's action (below chance: it is believed)",
    "mrr/pooled": "MRR by pooled cosine",
    "mrr/inverse": "MRR of the way back",
    "mrr/inverse_zero_action": "MRR of the way back, null action",
    "action_r2/mean": "R\N{SUPERSCRIPT TWO} of the action from two views",
    "action_r2/transfer_mean": "the same map, read from predictions",
    "action_r2/source_mean": "the same from the source alone",
    "error/mean": "prediction error, share of the null action's",
    "rank/rankme": "RankMe",
    "rank/lidar": "LiDAR",
    "knn/top1": "kNN",
    "linear/top1": "linear probe",
    "marginal/top1": "linear probe on expected tokens",
    "attentive/top1": "attentive probe",
    "lowshot1/top1": "linear probe, 1 % of the labels",
    "lowshot10/top1": "linear probe, 10 % of the labels",
}
# A component of the action, or a probe of an earlier layer; the ends of intervals stand in the cells.
_DETAIL = re.compile(
    r"(mrr|action_r2|error)/(brightness|contrast|saturation|hue|grayscale|blur|solarize)|.*/top1_layer\d+"
)


class _Row(NamedTuple):
    name: str
    cells: list[str]


def table_lines(measured: Measured) -> list[str]:
    """The table; figures that nobody measured have no row.

    Args:
        measured: of all tasks together.
    """
    subjects = list(measured)
    names = [name for name in _order(measured) if any(name in measured[subject] for subject in subjects)]
    rows = [_Row("", [*subjects, "chance"])]
    rows += [
        _Row(
            _NAMES.get(name, name),
            [*(_cell(measured[each], name) for each in subjects), _chance(measured, name)],
        )
        for name in names
    ]
    widths = [max(len(row.cells[column]) for row in rows) for column in range(len(subjects) + 1)]
    first = max(len(row.name) for row in rows)
    return [
        f"{row.name:{first}}  "
        + "  ".join(f"{cell:{width}}" for cell, width in zip(row.cells, widths, strict=True))
        for row in rows
    ]


def _order(measured: Measured) -> Sequence[str]:
    """Known figures first; then those by component of the action and by layer."""
    others = sorted({name for metrics in measured.values() for name in metrics} - set(_NAMES))
    return [*_NAMES, *(name for name in others if _DETAIL.fullmatch(name))]


def _cell(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return ""
    value = _number(metrics[name])
    if f"{name}_low" in metrics:
        return f"{value} [{_number(metrics[f'{name}_low'])}, {_number(metrics[f'{name}_high'])}]"
    if f"{name}_std" in metrics:
        return f"{value} \N{PLUS-MINUS SIGN} {_number(metrics[f'{name}_std'])}"
    return value


def _chance(measured: Measured, name: str) -> str:
    group, _, short = name.partition("/")
    hits = re.fullmatch(r"h(\d+)", short)
    if hits:
        views = [metrics["mrr/num_views"] for metrics in measured.values() if "mrr/num_views" in metrics]
        return _number(int(hits[1]) / views[0]) if views else ""
    if short in ("adjusted", "num_views"):
        return _number(0.0) if short == "adjusted" else ""
    found = [metrics[f"{group}/chance"] for metrics in measured.values() if f"{group}/chance" in metrics]
    return _number(found[0]) if found else ""


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
