"""A view of MLflow's UI that shows a sweep without any preparation: its trials' table, parallel coordinates, scatters.

MLflow keeps a saved view as a tag of the experiment; it then stands in the menu "Views" of the experiment's page. The form
is that of MLflow 3 (its `ExperimentPageUIState`); a version that does not know it shows its usual page.
"""

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

_HEIGHT = 360  # of a chart, pixels


def view_tag(name: str) -> str:
    """The experiment's tag that holds the view of a sweep; what follows its last dot opens it in an address."""
    return f"mlflow.sharedViewState.{name}"


def view(name: str, parent: str, axes: Sequence[str], metrics: Sequence[str], now_ms: int) -> str:
    """The value of that tag.

    Args:
        name: shown in the menu.
        parent: MLflow run of the sweep, whose children are shown.
        axes: params that vary.
        metrics: what to compare; the first one sorts the table and is every scatter's x.
        now_ms: when the view was made.
    """
    state = json.dumps(_state(parent, axes, metrics))
    packed = "deflate;" + base64.b64encode(zlib.compress(state.encode())).decode()
    return json.dumps({"name": name, "createdAt": now_ms, "updatedAt": now_ms, "state": packed})


def _state(parent: str, axes: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    columns = [
        *(_column("params", axis) for axis in axes),
        _column("tags", "iwm.seed"),
        *(_column("metrics", metric) for metric in metrics),
        _column("tags", "iwm.health"),
    ]
    first, *others = metrics
    lines: dict[str, Any] = {"selectedParams": axes, "selectedMetrics": [*others, first]}  # the last one colours them
    charts = [_chart("parallel", "PARALLEL", showAllRuns=True, **lines)]
    charts += [
        _chart("scatter", "SCATTER", metric, xaxis=_axis(first), yaxis=_axis(metric)) for metric in others
    ]
    return {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent}'",
        "orderByKey": _column("metrics", first),
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": {column: 20 + 8 * len(column.split("`")[1]) for column in columns},
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": charts,
        "compareRunSections": [
            _section("parallel", "What varies, and what comes of it", 1),
            _section("scatter", f"Against {first}", 3),
        ],
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
    }


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"


def _axis(metric: str) -> dict[str, str]:
    return {"key": metric, "type": "METRIC"}


def _chart(section: str, kind: str, name: str = "", **settings: Any) -> dict[str, Any]:
    fixed = {"uuid": f"{section}-{name}", "type": kind, "metricSectionId": section}
    return fixed | {"runsCountToCompare": 100, "deleted": False, "isGenerated": False} | settings


def _section(uuid: str, name: str, columns: int) -> dict[str, Any]:
    shape = {"columns": columns, "cardHeight": _HEIGHT, "display": True}
    return {"uuid": uuid, "name": name, "isReordered": True, "deleted": False, "isGenerated": False} | shape
