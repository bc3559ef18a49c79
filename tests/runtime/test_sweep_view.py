"""The view of MLflow's page: what its own reader would find in the tag."""

import base64
import json
import zlib

from iwm_ray.runtime.sweep_view import view, view_tag


def test_the_view_holds_what_is_to_be_compared():
    metrics = ["mrr/mrr", "linear/top1", "finetune/cifar10/difference"]
    envelope = json.loads(view("Sweep spectrum", "f" * 32, ["axis.depth", "axis.strength"], metrics, 12))
    assert (envelope["name"], envelope["createdAt"], envelope["updatedAt"]) == ("Sweep spectrum", 12, 12)
    header, packed = envelope["state"].split(";")
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert header == "deflate"
    assert state["searchFilter"] == f"tags.`mlflow.parentRunId` = '{'f' * 32}'"
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`mrr/mrr`", False)
    assert state["selectedColumns"][:2] == ["params.`axis.depth`", "params.`axis.strength`"]
    assert {f"metrics.`{name}`" for name in metrics} < set(state["selectedColumns"])
    parallel, *scatters = state["compareRunCharts"]
    assert parallel["selectedMetrics"][-1] == "mrr/mrr" and set(parallel["selectedMetrics"]) == set(metrics)
    assert [(each["xaxis"]["key"], each["yaxis"]["key"]) for each in scatters] == [
        ("mrr/mrr", name) for name in metrics[1:]
    ]
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == sections
    assert len({chart["uuid"] for chart in state["compareRunCharts"]}) == 3


def test_the_tag_fits_into_mlflow():
    """An experiment's tag holds 5000 characters; a long sweep needs a part of that."""
    axes = [f"axis.some_long_name_of_a_setting_{number}" for number in range(6)]
    metrics = [f"finetune/data_set_{number}/difference" for number in range(12)]
    assert len(view("Sweep of everything", "f" * 32, axes, metrics, 10**13)) < 5000
    assert view_tag("spectrum") == "mlflow.sharedViewState.spectrum"
