"""Optuna's choice of points: none twice, whatever was tried before."""

import pytest

pytest.importorskip("optuna")

from iwm_ray.run_directory import write_json
from iwm_ray.runtime.optuna_search import TwoGoals
from iwm_ray.sweeping.record import SweepDirectory
from iwm_ray.sweeping.space import Axis, Sweep, base

SWEEP = Sweep(
    "test",
    "Does it work?",
    base("laptop"),
    (
        Axis.of("predictor.depth", 2, 4, 8),
        Axis.of("predictor.conditioning", "none", "feature"),
        Axis.of("seed", 0),
    ),
)


def finish(directory: SweepDirectory, point: dict[str, str]) -> None:
    """A trial's results, as it would write them."""
    trial = SWEEP.trial(point)
    run = directory.run(trial.hash)
    run.path.mkdir(parents=True)
    write_json(run.config, trial.config.model_dump(mode="json"))
    metrics = {"mrr/mrr": int(point["predictor.depth"]) / 10, "linear/top1": 0.5}
    write_json(run.summary, {"status": "finished", "health": "ok", "health_line": "ok", "metrics": metrics})
    directory.note_done(SWEEP, trial, {})


def test_every_point_is_suggested_once_also_by_a_later_command(tmp_path):
    directory = SweepDirectory(tmp_path)
    directory.plan(SWEEP, SWEEP.trials())
    searcher, seen = TwoGoals(SWEEP, directory), []
    for number in range(3):
        point = searcher.suggest(f"first-{number}")["point"]
        finish(directory, point)
        searcher.on_trial_complete(f"first-{number}", {"done": True})
        seen.append(point)
    assert next(trial.values for trial in searcher._study.trials if trial.values) == [
        int(seen[0]["predictor.depth"]) / 10,
        0.5,
    ]

    later = TwoGoals(SWEEP, directory)
    for number in range(3):
        seen.append(later.suggest(f"later-{number}")["point"])
        later.on_trial_complete(f"later-{number}", error=True)
    assert sorted(map(str, seen)) == sorted(str(trial.point) for trial in SWEEP.trials())
    assert later.suggest("one more") == "FINISHED"
