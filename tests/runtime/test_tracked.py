"""The report from MLflow alone says what the report from the folders says."""

import json
import math
from pathlib import Path

import pytest

from iwm_ray import summary
from iwm_ray.cli import validate
from iwm_ray.config import TrackingConfig
from iwm_ray.errors import UsageError
from iwm_ray.run_directory import write_json
from iwm_ray.runtime.tracked import read_report
from iwm_ray.runtime.tracking import Tracker
from iwm_ray.sweep import open_parent
from iwm_ray.sweeping.record import SweepDirectory
from iwm_ray.sweeping.report import Report
from iwm_ray.sweeping.space import Axis, Sweep, base

PICTURE = b"\x89PNG\r\n\x1a\n"


def make_sweep(uri: str) -> Sweep:
    tree = base("laptop").model_dump() | {"tracking": {"uri": uri, "experiment": "maps"}}
    strength = {
        name: {"views.hue": hue, "views.crop_scale": (hue, 1.0)}
        for name, hue in (("weak", 0.05), ("strong", 0.2))
    }
    axes = (
        Axis.of("predictor.conditioning", "sequence", "none", "feature"),
        Axis("strength", strength),
        Axis.of("seed", 1, 0),
    )
    return Sweep("test", "Which end?", validate(tree), axes)


def figures(number: int) -> dict[str, float]:
    found = {"mrr/chance": 0.0239, "mrr/pooled": float("nan")}
    for name, value in (("mrr/mrr", 0.1 * number / 3), ("linear/top1", 0.5 - 0.01 * number**2)):
        found |= {name: value, f"{name}_low": value - 0.01, f"{name}_high": value + 0.01}
    return found


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[SweepDirectory, Sweep]:
    """A sweep of twelve trials and its MLflow runs, sent as a sweep sends them: one is still training, one has collapsed,
    one was measured twice."""
    folder = tmp_path_factory.mktemp("tracked")
    directory = SweepDirectory(folder / "sweep")
    sweep = make_sweep(f"sqlite:///{folder}/mlflow.db")
    directory.path.mkdir()
    trials = sweep.trials()
    directory.plan(sweep, trials)
    with open_parent(directory, sweep) as parent:
        parent.log_file(directory.definition, "")
    for number, trial in enumerate(trials):
        run = directory.run(trial.hash)
        (run.pictures).mkdir(parents=True)
        write_json(run.config, trial.config.model_dump(mode="json"))
        rows = [{"step": 8, "time": 1.7e9} | figures(3)] * (number == 5)
        rows += [{"step": 8, "time": 1.7e9 + 1} | figures(number)]
        run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ended = {
            "status": "finished",
            "health": "collapsed" if number == 7 else "ok",
            "health_line": f"line {number}",
        }
        tags = {"mlflow.parentRunId": parent.run_id, "mlflow.runName": trial.title}
        with Tracker(run.path, trial.config, trial.title, tags) as tracker:
            if number == 11:
                continue
            write_json(run.summary, ended | {"metrics": figures(number)})
            directory.note_done(sweep, trial, {})
            tracker.log_tags(summary.tags(ended))
            (run.pictures / "retrieval.png").write_bytes(PICTURE + bytes([number]))
            tracker.log_picture(run.pictures / "retrieval.png")
            tracker.finish()
        if number == 10:  # an arm of its finetuning is a child of the trial
            arm = {"mlflow.parentRunId": tracker.run_id, "mlflow.runName": "predictor-pretrained"}
            with Tracker(run.path / "finetune", trial.config, "arm", arm):
                pass
    directory.note_failure(trials[11], "RunError: it fell over")
    report = Report.open(directory.path)
    report.write()
    with open_parent(directory, sweep) as parent:
        parent.log_file(directory.report / "failures.json", "report")
    return directory, sweep


def assert_same(ours: Report, directory: SweepDirectory) -> None:
    theirs = Report.open(directory.path)
    assert (ours.title, ours.question, ours.failures) == (theirs.title, theirs.question, theirs.failures)
    assert ours.text == theirs.text
    assert ours.figures() == theirs.figures()
    assert [result.config for result in ours.results] == [result.config for result in theirs.results]
    assert [result.point for result in ours.results] == [result.point for result in theirs.results]
    ours.write()
    written = SweepDirectory(ours.folder).report
    assert written != directory.report
    for name in ("trials.csv", "map.png", "correlations.png", "effects.png", "heat.png"):
        assert (written / name).read_bytes() == (directory.report / name).read_bytes(), name


@pytest.mark.parametrize("where", ["experiment", "store", "run", "sweep"])
def test_mlflow_and_folders_give_the_same_report(swept, tmp_path, where):
    directory, sweep = swept
    ledger = json.loads((directory.path / "tracking.json").read_text())["stores"]
    words = {
        "experiment": "maps",
        "sweep": "test",
        "store": sweep.base.tracking.uri,
        "run": ledger[sweep.base.tracking.uri]["run_id"],
    }
    report = read_report(words[where], sweep.base.tracking, tmp_path / "read")
    assert_same(report, directory)
    page = (tmp_path / "read" / "report" / "report.html").read_text()
    assert "The equivariant end: seed" in page and "it fell over" in page


def test_figures_need_no_artifacts(swept, tmp_path, monkeypatch):
    """A store whose artifacts lie on a machine that is out of reach."""
    directory, sweep = swept
    artifacts = Path(sweep.base.tracking.uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    artifacts.rename(artifacts.with_name("away"))
    try:
        report = read_report("maps", sweep.base.tracking, tmp_path / "read")
    finally:
        artifacts.with_name("away").rename(artifacts)
    assert report.figures() == {**Report.open(directory.path).figures(), "sweep/failed": 0.0}
    assert not list((tmp_path / "read").rglob("*.png"))


def test_a_trial_that_is_only_trained_has_no_mrr(tmp_path):
    """Its training has ended with one of few images; another one has been measured, or none yet."""
    directory, sweep = SweepDirectory(tmp_path / "sweep"), make_sweep(f"sqlite:///{tmp_path}/mlflow.db")
    directory.path.mkdir()
    trials = sweep.trials()[:2]
    directory.plan(sweep, trials)
    ended = {"status": "finished", "health": "ok", "health_line": "ok"}
    with open_parent(directory, sweep) as parent:
        parent.log_file(directory.definition, "")
    closing = {name: value for name, value in figures(3).items() if name.startswith("mrr/")}
    for trial, rows in zip(
        trials, ([closing], [closing, figures(2) | {"mrr/num_views": 256.0}]), strict=True
    ):
        run = directory.run(trial.hash)
        run.path.mkdir(parents=True)
        write_json(run.config, trial.config.model_dump(mode="json"))
        run.metrics.write_text(
            "".join(
                json.dumps({"step": 8, "time": 1.7e9 + place} | row) + "\n" for place, row in enumerate(rows)
            )
        )
        write_json(run.summary, ended | {"metrics": rows[-1]})
        with Tracker(run.path, trial.config, trial.title, {"mlflow.parentRunId": parent.run_id}) as tracker:
            tracker.log_tags(summary.tags(ended))
            tracker.finish()
        report = read_report("maps", sweep.base.tracking, tmp_path / "read")
        assert report.results[0].status == "trained"
        assert math.isnan(report.results[0].figure("mrr/mrr"))
    assert report.results[1].figure("mrr/mrr") == pytest.approx(0.2 / 3)
    assert report.results[1].status == "finished"


def test_what_cannot_be_read_is_named(swept, tmp_path):
    _, sweep = swept
    with pytest.raises(UsageError, match="--report map: neither a folder nor a sweep or experiment .* maps"):
        read_report("map", sweep.base.tracking, tmp_path)
    with pytest.raises(UsageError, match="--report it's: neither"):
        read_report("it's", sweep.base.tracking, tmp_path)
    missing = TrackingConfig(uri=f"sqlite:///{tmp_path}/nothing.db")
    with pytest.raises(
        UsageError, match=r"--report runs/mpas: no such folder; .*nothing.db: there is nothing to read"
    ):
        read_report("runs/mpas", missing, tmp_path)
    assert not (tmp_path / "nothing.db").exists()
    with pytest.raises(UsageError, match="127.0.0.1:9: does not answer"):
        read_report("http://127.0.0.1:9", sweep.base.tracking, tmp_path)
