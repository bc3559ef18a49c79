"""Points chosen by Optuna (TPE) with two goals: a high MRR, and a good linear probe.

Optuna forgets everything when the driver ends; it is told of all finished trials when it begins.
"""

import math
from typing import Any

import optuna
from ray.tune.search import Searcher

from iwm_ray.sweeping.record import SweepDirectory
from iwm_ray.sweeping.results import LINEAR, MRR, Result, read_results
from iwm_ray.sweeping.space import Point, Sweep, choose

_TRIES = 10


class TwoGoals(Searcher):
    """Suggests points of the grid that have not been tried.

    Args:
        sweep: its axes are the space; all of them are choices without order.
        directory: where finished trials are read, those of earlier commands too.
    """

    def __init__(self, sweep: Sweep, directory: SweepDirectory) -> None:
        super().__init__()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sweep, self._directory = sweep, directory
        sampler = optuna.samplers.TPESampler(seed=sweep.base.seed)
        self._study = optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)
        self._space = {
            axis.name: optuna.distributions.CategoricalDistribution(list(axis.values)) for axis in sweep.axes
        }
        self._asked: dict[str, tuple[optuna.trial.Trial, Point]] = {}
        self._seen: dict[str, tuple[float, float]] = {}
        """hash -> goals of the points that were tried; NaN while they run"""
        if directory.runs():
            self._learn(read_results(directory.path))

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        for _ in range(_TRIES):
            asked, point, name = self._ask()
            if name not in self._seen:
                break
            self._tell(asked, self._seen[name])
        else:  # it would only repeat itself
            new = [trial for trial in self._sweep.trials() if trial.hash not in self._seen]
            if not new:
                return str(Searcher.FINISHED)
            self._study.enqueue_trial(choose(new, 1, len(self._seen))[0].point)
            asked, point, name = self._ask()
        self._asked[trial_id], self._seen[name] = (asked, point), (math.nan, math.nan)
        return {"point": point}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        asked, point = self._asked.pop(trial_id)
        name = self._sweep.trial(point).hash
        began = self._directory.runs()  # none, where a request to stop came first
        found = {each.config.hash(): each for each in read_results(self._directory.path)} if began else {}
        if not error and name in found:
            self._seen[name] = _goals(found[name])
        self._tell(asked, self._seen[name])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's folder is the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's folder is the record."""

    def _learn(self, results: list[Result]) -> None:
        done = {
            trial.hash: trial.point
            for trial in self._sweep.trials()
            if self._directory.status(self._sweep, trial) == "finished"
        }
        for result in results:
            name, goals = result.config.hash(), _goals(result)
            if name in done and not math.isnan(sum(goals)):
                self._seen[name] = goals
                self._study.add_trial(
                    optuna.trial.create_trial(
                        params=done[name], distributions=self._space, values=list(goals)
                    )
                )

    def _ask(self) -> "tuple[optuna.trial.Trial, Point, str]":
        """A trial of Optuna's, its point, and that point's hash."""
        asked = self._study.ask(self._space)
        point = {axis: str(value) for axis, value in asked.params.items()}
        return asked, point, self._sweep.trial(point).hash

    def _tell(self, asked: "optuna.trial.Trial", goals: tuple[float, float]) -> None:
        if math.isnan(sum(goals)):
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(asked, list(goals))


def _goals(result: Result) -> tuple[float, float]:
    return result.figure(MRR), result.figure(LINEAR.metric)
