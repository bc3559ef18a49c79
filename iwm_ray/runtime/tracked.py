"""The report of a sweep from MLflow alone: params, metrics, tags and a few artifacts, wherever the run directories are."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from iwm_ray.cli import validate
from iwm_ray.config import Config, TrackingConfig
from iwm_ray.errors import UsageError
from iwm_ray.run_directory import RunDirectory
from iwm_ray.runtime import tracking
from iwm_ray.sweeping.record import SweepDirectory, planned
from iwm_ray.sweeping.report import Report
from iwm_ray.sweeping.results import BEGUN, NOT_FINISHED, TRAINED, Result, in_grid_order, named_points

_PARENT = "mlflow.parentRunId"
_SWEEP = "iwm.sweep"
_ALL = "attribute.start_time ASC"


def read_report(where: str, usual: TrackingConfig, folder: Path | None) -> Report:
    """The report of the newest sweep of an experiment; of its runs, where it holds no sweep.

    MLflow knows that a training has ended, and whether anything was measured since, not that all which is asked of its
    trial is done.

    Args:
        where: an experiment, or the URI of a store, or the id of a sweep's MLflow run, or the name of a sweep, of which the
            newest is taken.
        usual: the store and the experiment where `where` does not name them.
        folder: where the report is to be written; None: `runs/sweeps/<experiment>-mlflow`.

    Raises:
        UsageError: there is no such store, experiment or run, or nothing in it.
    """
    is_uri = "://" in where
    named = usual.model_copy(update={"uri": where} if is_uri else {"experiment": where})
    try:
        client, uri = tracking.open_store(Config(recipe="report", tracking=named))
    except UsageError as error:
        if is_uri:
            raise
        raise UsageError(f"--report {where}: no such folder; {error}") from None
    experiment = client.get_experiment_by_name(named.experiment)
    parent = None
    if experiment is None and not is_uri:
        parent = _run(client, where) or _sweep_called(client, where)
        experiment = parent and client.get_experiment(parent.info.experiment_id)
    if experiment is None:
        names = ", ".join(each.name for each in client.search_experiments())
        raise UsageError(
            f"--report {where}: neither a folder nor a sweep or experiment of {uri}; give one of them, or the store's URI "
            f"with --tracking.experiment: {names}"
        )
    runs = list(_runs(client, [experiment.experiment_id]))
    parent = parent or _newest_sweep(runs)
    parent_id = parent.info.run_id if parent else None
    trials = [run for run in runs if run.data.tags.get(_PARENT) == parent_id]
    by_hash = {run.data.tags["iwm.config_hash"]: run for run in trials if "iwm.config_hash" in run.data.tags}
    if not by_hash:
        raise UsageError(f"--report {where}: no trials in {uri}, experiment {experiment.name}")
    place = SweepDirectory((folder or Path("runs/sweeps") / f"{experiment.name}-mlflow").absolute())
    definition = _json(client, parent, "sweep.json")
    results = [_result(run, place.run(name)) for name, run in by_hash.items()]
    if parent:
        results = [
            replace(each, status=TRAINED) if each.status == "finished" and not each.is_measured else each
            for each in results
        ]
    report = Report(
        place.path,
        f"Sweep {definition.get('name', experiment.name)}",
        definition.get("question", ""),
        in_grid_order(results, definition.get("trials", {})),
        _json(client, parent, "report/failures.json"),
        planned(definition),
    )
    for group in named_points(report.groups).values():
        _fetch_picture(client, by_hash[group.first.path.name], group.first.path)
    return report


def _runs(client: Any, experiments: list[str], only: str = "") -> Iterator[Any]:
    """All runs of some experiments, or those that a filter lets through, the oldest first."""
    token = None
    while True:
        page = client.search_runs(experiments, only, max_results=1000, order_by=[_ALL], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _run(client: Any, run_id: str) -> Any:
    """A run by its id; None where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException:
        return None


def _sweep_called(client: Any, name: str) -> Any:
    """The run of the newest sweep of this name, in whatever experiment; None where there is none."""
    if "'" in name:  # no name of a sweep, and the end of a string in MLflow's filters
        return None
    experiments = [each.experiment_id for each in client.search_experiments()]
    return _newest_sweep(list(_runs(client, experiments, f"tags.`{_SWEEP}` = '{name}'")))


def _newest_sweep(runs: list[Any]) -> Any:
    """The newest run of a whole sweep; None where there is none. (A trial has the arms of its finetuning as children.)"""
    return next(
        (run for run in reversed(runs) if _SWEEP in run.data.tags and _PARENT not in run.data.tags), None
    )


def _result(run: Any, directory: RunDirectory) -> Result:
    """A trial as its MLflow run has it; its summary is there once its training has ended."""
    tags = run.data.tags
    metrics = run.data.metrics if "iwm.status" in tags else {}
    return Result(
        directory.path,
        _config(run.data.params),
        {},
        tags.get("iwm.status", BEGUN),
        tags.get("iwm.health", ""),
        tags.get("iwm.health_line", NOT_FINISHED),
        {name: value for name, value in metrics.items() if not name.startswith("system/")},
    )


def _config(params: dict[str, str]) -> Config:
    """The configuration that a run's params are the flat form of."""
    tree: dict[str, Any] = {}
    for name, text in params.items():
        section, _, field = name.rpartition(".")
        if section not in ("", *Config.model_fields):
            continue
        place = tree.setdefault(section, {}) if section else tree
        place[field] = json.loads(text) if text.startswith("[") else text
    return validate(tree)


def _json(client: Any, run: Any, name: str) -> dict[str, Any]:
    """A JSON artifact of a run; empty where it has none, or where its storage is out of reach."""
    content = _artifact(client, run, name) if run is not None else b""
    return dict(json.loads(content)) if content else {}


def _fetch_picture(client: Any, run: Any, path: Path) -> None:
    """Puts a run's retrieval picture where the report looks for it."""
    content = _artifact(client, run, "pictures/retrieval.png")
    if content:
        pictures = RunDirectory(path).pictures
        pictures.mkdir(parents=True, exist_ok=True)
        (pictures / "retrieval.png").write_bytes(content)


def _artifact(client: Any, run: Any, name: str) -> bytes:
    """The bytes of an artifact; none where it is missing or out of reach: figures need no artifacts."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return Path(client.download_artifacts(run.info.run_id, name, folder)).read_bytes()
        except tracking.failures():
            return b""
