import json

import pytest

from iwm_ray import summary
from iwm_ray.build import build
from iwm_ray.cli import parse_pretrain
from iwm_ray.run_directory import RunDirectory
from iwm_ray.training.metrics_log import MetricsLog
from iwm_ray.workers import Outcome


@pytest.fixture
def setup(tiny_command, tmp_path):
    command, _ = parse_pretrain(tiny_command(tmp_path / "run", {"--schedule.steps": 30}))
    run = RunDirectory(tmp_path / "run")
    made = build(command.config, run)
    with run.lock():
        run.create(command.config, made.feed.index.hash)
    return made


def report(step, time, rate=32.0, **values):
    return {
        "step": step,
        "time": time,
        "train/samples_per_second": rate,
        "train/data_wait_fraction": 0.25,
        **values,
    }


MONITORS = {
    "monitor/loss": 0.5,
    "monitor/action_gap": 0.1,
    "monitor/rankme": 20.0,
    "monitor/target_std": 0.4,
    "monitor/knn_top1": 0.5,
    "monitor/knn_chance": 0.1,
}


def write(setup, *rows):
    log = MetricsLog(setup.run.metrics)
    for row in rows:
        log.append(row["step"], {name: value for name, value in row.items() if name not in ("step", "time")})


def test_the_summary_holds_the_newest_value_of_each_metric(setup):
    write(
        setup,
        {"step": 0, **MONITORS, "monitor/knn_top1": 0.2},
        {"step": 30, "train/loss": 0.4, "train/skipped_steps": 0.0},
        {"step": 30, **MONITORS},
        {"step": 30, "mrr/mrr": 0.7},
    )
    found = summary.summarise(setup, Outcome("finished", 30))
    assert json.loads(setup.run.summary.read_text()) == found
    assert {name: found[name] for name in ("status", "steps", "total_steps", "samples", "quarantined")} == {
        "status": "finished",
        "steps": 30,
        "total_steps": 30,
        "samples": 960,
        "quarantined": 0,
    }
    assert found["health"] == "ok"
    assert found["health_line"].startswith("ok: RankMe 20.0 of 64")
    assert found["metrics"]["monitor/knn_top1"] == 0.5
    assert found["metrics"]["mrr/mrr"] == 0.7
    assert summary.finished(setup.run) == Outcome("finished", 30)


@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_only_a_finished_run_is_finished(setup, status):
    assert summary.finished(setup.run) is None
    write(setup, {"step": 12, **MONITORS})
    found = summary.summarise(setup, Outcome(status, -1, "because"))
    assert (found["status"], found["steps"], found["samples"]) == (status, 12, 12 * 32)
    assert summary.finished(setup.run) is None


def test_a_run_without_a_single_reading_has_a_summary(setup):
    found = summary.summarise(setup, Outcome("failed", -1, "at once"))
    assert (found["steps"], found["goodput"], found["metrics"]) == (0, 0.0, {})
    assert found["health"] == "warn"


def test_goodput_is_the_share_of_the_runs_time_that_counts(setup):
    """Batches of 32 at 32 images/s: a step a second. Two starts, between which the user slept."""
    setup.run.attempts.write_text('{"start": 100.0}\n{"start": 1000.0}\n')
    rows = [
        report(10, 120.0),  # 10 s to start, 10 s of steps
        report(20, 131.0),  # and died after that; four steps were lost
        report(30, 1025.0),  # 15 s to start, 10 s of steps
    ]
    assert summary.goodput(setup, rows) == pytest.approx(30 / (31 + 25), abs=1e-3)
    assert summary.goodput(setup, rows[:2]) == pytest.approx(20 / 31, abs=1e-3)


def test_a_start_that_died_before_its_first_report_counts_for_nothing(setup):
    setup.run.attempts.write_text('{"start": 100.0}\n{"start": 200.0}\n')
    assert summary.goodput(setup, []) == 0.0
    assert summary.goodput(setup, [report(10, 220.0)]) == pytest.approx(0.5)


def test_each_start_is_noted(setup):
    summary.note_start(setup.run)
    summary.note_start(setup.run)
    first, second = (json.loads(line)["start"] for line in setup.run.attempts.read_text().splitlines())
    assert first <= second


def test_the_closing_lines_read_well(setup):
    rows = [
        {"step": 0, "time": 1.0, **MONITORS, "monitor/knn_top1": 0.2},
        report(30, 2.0, rate=1234.5),
        {"step": 30, "time": 3.0, **MONITORS},
    ]
    mrr = {"mrr/mrr": 0.7, "mrr/chance": 0.024, "mrr/zero_action": 0.03, "mrr/shuffled_action": 0.02}
    found = {
        "status": "finished",
        "steps": 30,
        "health_line": "ok: RankMe 20",
        "quarantined": 3,
        "goodput": 0.914,
        "metrics": mrr,
    }
    setup.run.pictures.joinpath("retrieval.png").touch()
    path = setup.run.path
    assert summary.lines(setup, found, rows, "mlflow ui") == [
        f"finished at step 30 of 30: {path}",
        "  MRR     0.700 (chance 0.024, shuffled action 0.020, zero action 0.030; 8 views an image)",
        "  kNN     0.500 (chance 0.100, untrained 0.200)",
        "  health  ok: RankMe 20",
        "  speed   1,234 images/s (median), 25.0 % of the time waiting for data, goodput 0.91",
        f"  data    3 samples could not be read: {path}/quarantine.jsonl",
        f"  picture {path}/pictures/retrieval.png",
        "  MLflow  mlflow ui",
    ]


def test_a_stopped_run_says_how_it_goes_on(setup):
    found = {
        "status": "stopped",
        "steps": 7,
        "health_line": "ok",
        "quarantined": 0,
        "goodput": 0,
        "metrics": {},
    }
    said = summary.lines(setup, found, [], "")
    assert said[-1] == "saved at step 7; the same command resumes the run"
    assert not any("MRR" in line or "kNN" in line or "speed" in line for line in said)
