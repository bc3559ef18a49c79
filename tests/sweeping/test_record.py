"""The files of a sweep: what is done, what is not, what failed."""

import json
from dataclasses import replace

import pytest

from iwm_ray.cli import validate
from iwm_ray.errors import UsageError
from iwm_ray.finetuning.settings import FinetuneConfig
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


def test_a_record_of_an_older_version_is_filled_with_the_defaults(directory):
    """Settings that were added since, and where figures are sent, leave a finished trial finished."""
    sweep = replace(SWEEP, finetune=FinetuneConfig())
    trial = sweep.trials()[0]
    begin(directory, trial, "finished")
    directory.note_done(sweep, trial, {})
    file = directory.run(trial.hash).path / "trial.json"
    record = json.loads(file.read_text())
    del record["asked"]["finetune"]["layer_decay"], record["asked"]["measure"]["repeats"]
    write_json(file, record)
    assert directory.status(sweep, trial) == "finished"
    tracked = FinetuneConfig.model_validate({"tracking": {"uri": "none"}})
    assert directory.status(replace(sweep, finetune=tracked), trial) == "finished"
    lenient = FinetuneConfig.model_validate({"data": {"max_bad_fraction": 0.5}})
    assert directory.status(replace(sweep, finetune=lenient), trial) == "finished"
    other = FinetuneConfig.model_validate({"layer_decay": 0.5})
    assert directory.status(replace(sweep, finetune=other), trial) == "begun"
    record["asked"]["finetune"]["depth_of_thought"] = 3
    write_json(file, record)
    assert directory.status(sweep, trial) == "begun"


def with_setting(sweep: Sweep, section: str, name: str, value: object) -> Sweep:
    tree = sweep.base.model_dump()
    tree[section][name] = value
    return replace(sweep, base=validate(tree))


def test_other_settings_need_another_folder(directory):
    directory.plan(SWEEP, SWEEP.trials())
    longer = with_setting(SWEEP, "schedule", "steps", 3600)
    with pytest.raises(UsageError, match=r"schedule.steps 500, these 3600; choose another --output"):
        directory.refuse_other(longer, longer.trials())
    more = longer.with_seeds([7, 8])  # other seeds of another training are no repetitions either
    with pytest.raises(UsageError, match="schedule.steps"):
        directory.refuse_other(more, more.trials())


def test_another_sweep_needs_another_folder(directory):
    directory.plan(SWEEP, SWEEP.trials())
    directory.refuse_other(SWEEP, SWEEP.trials())
    other = replace(SWEEP, name="capacity")
    with pytest.raises(
        UsageError, match=r"holds the sweep 'test', this is 'capacity'; choose another --output"
    ):
        directory.refuse_other(other, other.trials())


def test_a_folder_holds_a_sweep_or_runs(tmp_path):
    directory = SweepDirectory(tmp_path)
    assert not directory.holds_any()
    (tmp_path / "run").mkdir()
    assert not directory.holds_any()
    (tmp_path / "run" / "config.json").touch()
    assert directory.holds_any()


def test_the_same_settings_go_on(directory):
    """In a larger grid, elsewhere, along an axis whose base has moved, and where the record is older than a setting."""
    grown = replace(SWEEP, axes=(*SWEEP.axes, Axis.of("predictor.depth", 2, 4)))
    directory.plan(SWEEP, SWEEP.trials())
    record = json.loads(directory.definition.read_text())
    del record["base"]["masks"]["style"]
    write_json(directory.definition, record)
    elsewhere = with_setting(SWEEP.with_seeds([0, 1, 2]), "runtime", "data_workers", 2)
    moved = with_setting(grown, "predictor", "depth", 4)
    for sweep in (SWEEP, elsewhere, grown, moved):
        directory.refuse_other(sweep, sweep.trials())


def test_a_value_that_means_something_else_now_needs_another_folder(directory):
    weak, strong = (replace(SWEEP, axes=(Axis("jitter", {"x": {"views.hue": hue}}),)) for hue in (0.1, 0.2))
    directory.plan(weak, weak.trials())
    directory.refuse_other(strong, strong.trials())  # nothing was begun with it
    begin(directory, weak.trials()[0])
    with pytest.raises(UsageError, match=r"its jitter=x have views.hue 0.1, these 0.2"):
        directory.refuse_other(strong, strong.trials())
