"""The files of a sweep: what is done, what is not, what failed."""

from dataclasses import replace

import pytest

from iwm_ray.run_directory import write_json
from iwm_ray.sweeping.record import SweepDirectory
from iwm_ray.sweeping.space import QUICK, Axis, Sweep, base

SWEEP = Sweep("test", "Does it work?", base("laptop"), (Axis.of("seed", 0, 1),))


@pytest.fixture
def directory(tmp_path):
    return SweepDirectory(tmp_path)


def begin(directory, trial, status=None):
    run = directory.run(trial.hash)
    run.path.mkdir(parents=True, exist_ok=True)
    write_json(run.config, trial.config.model_dump(mode="json"))
    if status:
        write_json(run.summary, {"status": status})


def test_a_trial_is_finished_only_by_what_is_asked_now(directory):
    trial = SWEEP.trials()[0]
    assert directory.status(SWEEP, trial) == "new"
    begin(directory, trial, "finished")
    assert directory.status(SWEEP, trial) == "begun"
    directory.note_done(SWEEP, trial, {"train": 1.0})
    assert directory.status(SWEEP, trial) == "finished"
    more = replace(SWEEP, measure=QUICK.model_copy(update={"images": 999}))
    assert directory.status(more, trial) == "begun"
    (directory.run(trial.hash).path / "trial.json").write_text("{ torn")
    assert directory.status(SWEEP, trial) == "begun"


def test_what_a_scheduler_stopped_goes_on_without_it(directory):
    trial = SWEEP.trials()[0]
    begin(directory, trial, "stopped")
    directory.note_done(SWEEP, trial, {}, "stopped")
    assert directory.status(SWEEP, trial, keep_stopped=True) == "stopped"
    assert directory.status(SWEEP, trial) == "begun"


def test_failures_are_named_counted_and_forgotten(directory):
    trial = SWEEP.trials()[1]
    begin(directory, trial)
    directory.note_failure(trial, "no space")
    directory.note_failure(trial, "still none")
    assert directory.status(SWEEP, trial) == "failed"
    (found,) = directory.failures().values()
    assert (found["title"], found["reason"], found["attempts"]) == ("seed=1", "still none", 2)
    write_json(directory.run(trial.hash).summary, {"status": "finished"})
    directory.note_done(SWEEP, trial, {})
    assert directory.failures() == {}
    directory.note_failure(trial, "it broke afterwards")
    assert directory.status(SWEEP, trial) == "failed"


def test_the_plan_of_a_larger_grid_keeps_the_trials_before(directory):
    directory.plan(SWEEP, SWEEP.trials())
    larger = SWEEP.with_seeds((1, 2))
    directory.plan(larger, larger.trials())
    assert [point["seed"] for point in directory.points().values()] == ["0", "1", "2"]
