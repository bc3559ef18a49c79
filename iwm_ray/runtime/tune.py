"""Trials under Ray Tune: as many at once as the cluster holds, each with all that it needs.

Ray Tune schedules; it remembers nothing for us. Its own files are thrown away, and what is done is read from the sweep's
folder (sweeping/record.py).
"""

import ctypes
import gc
import json
import logging
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, PlacementGroupFactory, RunConfig, TuneConfig
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from iwm_ray.config import Config
from iwm_ray.errors import RunError, UsageError
from iwm_ray.run_directory import RunDirectory
from iwm_ray.runtime import cluster
from iwm_ray.runtime.cluster import Asked, Node
from iwm_ray.sweeping.job import Job
from iwm_ray.sweeping.space import SEED, Trial, short_names, words
from iwm_ray.training import metrics_log

Work = Callable[[Job], None]
Say = Callable[[str], None]

_POLL_SECONDS = 0.2
_USAGE, _FAILED = "usage_error", "run_error"  # results by which a trial says that no repetition can mend it
_HEAD = "node:__internal_head__"  # a resource that only the head node has, in plenty


# ---- how many fit ----


@dataclass(frozen=True)
class Room:
    """What each trial gets, and how many of them run at once."""

    at_once: int
    asked: Asked
    """of one trial"""
    own_workers: bool
    """whether a trial is a TorchTrainer with workers and data tasks of its own; if not, one process is all of it"""
    line: str
    problem: str = ""
    """why not even one trial fits here; empty: it does"""

    @property
    def resources(self) -> PlacementGroupFactory:
        """What Tune reserves for a trial. One with workers reserves nothing but a place on the head node: Ray Train
        reserves the workers', and the rest of the CPUs stays for the data tasks, since no more trials are started."""
        if self.own_workers:
            return PlacementGroupFactory([{_HEAD: 0.001}])
        gpus = {"GPU": self.asked.gpus} if self.asked.gpus else {}
        return PlacementGroupFactory([{"CPU": self.asked.cpus} | gpus])


def demand(config: Config, gpus: float) -> Asked:
    """What one trial needs.

    Args:
        config: of a trial.
        gpus: of each trial of engine local, 1 or 1/2, 1/3 ... of a GPU; counted only with `runtime.use_gpu`.
    """
    runtime = config.runtime
    if runtime.engine == "ray":
        return Asked.by(config)
    data = runtime.data_workers or max(1, cluster.num_cpus() // 2)
    share = gpus if runtime.use_gpu else 0.0
    # Data processes of a small trial take turns with its training: they are half idle (docs/design.md).
    return Asked(1, runtime.cpus_per_worker + (data if runtime.use_gpu else 0), share, 0)


def times(asked: Asked, count: int) -> Asked:
    """What so many trials need together."""
    return replace(asked, num_workers=count * asked.num_workers, data_cpus=count * asked.data_cpus)


def fit(present: Sequence[Node], asked: Asked, most: int) -> int:
    """How many trials fit beside each other, data tasks included; at most `most`."""
    count = 0
    while count < most and cluster.describe(present, times(asked, count + 1)) is None:
        count += 1
    return count


def make_room(config: Config, gpus: float, num_trials: int, most: int = 0) -> Room:
    """`look_for_room` where trials must be able to run.

    Raises:
        UsageError: as there; or not even one fits.
    """
    room = look_for_room(config, gpus, num_trials, most)
    if room.problem:
        raise UsageError(room.problem)
    return room


def look_for_room(config: Config, gpus: float, num_trials: int, most: int = 0) -> Room:
    """Finds out whether trials can run, and how many at once.

    Args:
        config: of a trial; all ask for the same.
        gpus: see `demand`.
        num_trials: how many there are to run.
        most: the largest number at once; 0: as many as fit.

    Raises:
        UsageError: a wrong share of a GPU, or the cluster cannot be reached.
    """
    if not (gpus > 0 and math.isclose(1 / gpus, round(1 / gpus))):
        raise UsageError(f"--gpus-per-trial {gpus:g}: needs 1 or a whole part of it, such as 0.5 or 0.25")
    cluster.refuse_unsafe_switches()
    asked = demand(config, gpus)
    limit = max(1, min(num_trials, most or num_trials))
    if ray.is_initialized() or cluster.cluster_address() is not None:
        cluster.connect(config)
        present, where, problem = cluster.nodes(), "the cluster has", None
    else:
        import torch

        present, where = [Node("here", cluster.num_cpus(), torch.cuda.device_count())], "this machine has"
        problem = cluster.describe_machine(cluster.num_cpus(), torch.cuda.device_count(), asked)
    count = fit(present, asked, limit)
    if count == 0 and ray.is_initialized():
        problem = cluster.describe(present, asked)
    count = max(count, 1)  # on a machine of its own one trial may let its data tasks take turns with it
    gpu = f" + {asked.gpus:g} GPU" if asked.gpus else ""
    data = f" + {asked.data_cpus:g} for data" if asked.data_cpus else ""
    each = f"each {asked.num_workers} x {asked.cpus:g} CPU{gpu}{data}"
    there = (
        f"{where} {sum(node.cpus for node in present):g} CPUs, {sum(node.gpus for node in present):g} GPUs"
    )
    line = f"{each}; not here: {problem}" if problem else f"{count} at once, {each}; {there}"
    return Room(count, asked, config.runtime.engine == "ray", line, problem or "")


def connect(config: Config, room: Room, debug: bool = False) -> None:
    """Connects to the cluster, or starts one on this machine that is large enough for the trials at once."""
    together = times(room.asked, room.at_once)
    runtime = config.runtime.model_copy(
        update={
            "num_workers": together.num_workers,
            "cpus_per_worker": together.cpus,
            "data_cpus": max(1.0, together.data_cpus),
        }
    )
    cluster.connect(config.model_copy(update={"runtime": runtime}), debug)
    # Ray Train's cleaner of stopped trainers looks for a cluster by itself, and fails where it finds several.
    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


# ---- running ----


@dataclass(frozen=True)
class Asha:
    """Stops trials that fall behind (asynchronous successive halving).

    It compares a metric of the monitors, at steps that double: the better half goes on.
    """

    metric: str
    mode: str
    total_steps: int
    grace_steps: int

    def scheduler(self) -> TrialScheduler:
        return ASHAScheduler(
            time_attr="step",
            metric=self.metric,
            mode=self.mode,
            max_t=self.total_steps + 1,  # at max_t it stops what it should let finish
            grace_period=self.grace_steps,
            reduction_factor=2,
        )


def run_trials(
    jobs: Sequence[Job],
    work: Work,
    room: Room,
    *,
    max_failures: int,
    asha: Asha | None = None,
    searcher: Searcher | None = None,
    num_samples: int = 1,
    say: Say = print,
    debug: bool = False,
) -> None:
    """Runs the trials, each at most `max_failures` + 1 times; the results are in the sweep's folder.

    A stop request there has those under way save and stop, and no other begin.

    Args:
        jobs: the trials to run; with a searcher one of them as the pattern, whose trial is replaced.
        work: does a job, in a process of the cluster.
        room: see `make_room`; we are connected.
        max_failures: attempts after the first.
        asha: stops trials early; None: all run to their end.
        searcher: chooses points while it learns from results; None: the jobs' own.
        num_samples: how many the searcher chooses.
        say: takes a line for each trial that ends, and for each attempt that fails.
        debug: also print the traceback of each failure.
    """
    _set_tune_up(debug)
    pattern = jobs[0]
    points = [job.trial.point for job in jobs]
    folder = tempfile.mkdtemp(prefix="iwm-tune-")
    trainable = tune.with_parameters(_Trial, pattern=pattern, work=work, asha=asha)
    tuner = tune.Tuner(
        tune.with_resources(trainable, room.resources),
        param_space={} if searcher else {"point": tune.grid_search(points)},
        tune_config=TuneConfig(
            scheduler=asha.scheduler() if asha else FIFOScheduler(),
            search_alg=searcher,
            num_samples=num_samples if searcher else 1,
            max_concurrent_trials=room.at_once,
            reuse_actors=True,
        ),
        run_config=RunConfig(
            name="sweep",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            callbacks=[_Lines(pattern, num_samples if searcher else len(jobs), max_failures + 1, say)],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _set_tune_up(debug: bool) -> None:
    """Ray reads these when a tuner begins."""
    # Its new output prints tables even when it is told to be quiet.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # A finished trial may end without its metric.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    # Tracebacks of what `_Lines` names, and its own list of trials that failed.
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "1" if debug else "0")
    logging.getLogger("ray.tune.tune").setLevel(logging.NOTSET if debug else logging.CRITICAL)


def run_beside(
    trials: Sequence[Callable[[], None]],
    titles: Sequence[str],
    room: Room,
    *,
    max_failures: int,
) -> None:
    """Runs functions as Tune trials, each at most `max_failures` + 1 times; what no repetition can mend fails at once.

    Args:
        trials: what they do; each travels to the process that does it.
        titles: their names, for a person.
        room: see `make_room`; we are connected.
        max_failures: attempts after the first, of those whose process dies.

    Raises:
        UsageError, RunError: a trial failed; the others were run.
    """

    def trial(config: dict[str, Any], trials: Sequence[Callable[[], None]]) -> dict[str, str]:
        try:
            trials[config["number"]]()
        except UsageError as failure:
            return {_USAGE: str(failure)}
        except RunError as failure:
            return {_FAILED: str(failure)}
        return {}

    folder = tempfile.mkdtemp(prefix="iwm-tune-")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, trials=list(trials)), room.resources),
        param_space={"number": tune.grid_search(list(range(len(trials))))},
        tune_config=TuneConfig(scheduler=FIFOScheduler(), max_concurrent_trials=room.at_once),
        run_config=RunConfig(
            name="trials",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[_Titles(titles)],
            verbose=0,
        ),
    )
    try:
        results = tuner.fit()
        failures = [str(error) for error in results.errors]
        told = [result.metrics or {} for result in results]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, kind in ((_USAGE, UsageError), (_FAILED, RunError)):
        messages = [metrics[name] for metrics in told if name in metrics]
        if messages:
            raise kind(messages[0])
    if failures:
        lines = [line.strip() for line in failures[0].splitlines() if line.strip()]
        raise RunError(lines[-1] if lines else "a trial's process died")


class _Titles(Callback):
    """A line for each trial that ends."""

    def __init__(self, titles: Sequence[str]) -> None:
        self._titles, self._ended = titles, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, "failed" if {_USAGE, _FAILED} & set(trial.last_result or ()) else "done")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, "failed")

    def _end(self, trial: Any, how: str) -> None:
        self._ended += 1
        print(f"{self._ended}/{len(self._titles)} {self._titles[trial.config['number']]}: {how}", flush=True)


class _Trial(tune.Trainable):
    """A trial in its process: the work in a thread, its metrics handed on as they appear, its end asked for politely."""

    def setup(self, config: dict[str, Any], pattern: Job, work: Work, asha: Asha | None) -> None:
        self._pattern, self._work, self._asha = pattern, work, asha
        self._thread: threading.Thread | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end()
        _return_memory()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        self._end()

    def step(self) -> dict[str, Any]:
        """The next value that the scheduler judges by, or the end of the trial."""
        while self._thread is not None and self._thread.is_alive():
            if self._is_stopped:
                self._end()
            row = self._next_row()
            if row:
                return row
            self._thread.join(_POLL_SECONDS)
        if self._failed and not self._is_stopped:
            self._job.directory.note_failure(self._job.trial, _reason(self._failed[0]))
            raise self._failed[0]
        return self._last | {"done": True}

    def _begin(self, config: dict[str, Any]) -> None:
        trial = self._pattern.sweep.trial(dict(config["point"]))
        tags = self._pattern.tags | _tags(trial)
        self._job = replace(self._pattern, trial=trial, tags=tags)
        self._failed: list[BaseException] = []
        self._last: dict[str, Any] = {"step": -1}
        self._thread = None
        if not self._is_stopped:
            self._thread = threading.Thread(target=self._run, name=f"trial-{trial.hash}", daemon=True)
            self._thread.start()

    @property
    def _is_stopped(self) -> bool:
        """Whether the whole sweep is asked to save and stop."""
        return RunDirectory(self._job.directory.path).stop_request.exists()

    def _run(self) -> None:
        try:
            self._work(self._job)
        except BaseException as error:  # handed to `step`, which raises it
            self._failed.append(error)

    def _next_row(self) -> dict[str, Any] | None:
        if self._asha is None:
            return None
        # At the last step there is nothing left to save: the trial is measured, however it compares.
        metric, steps = self._asha.metric, range(self._last["step"] + 1, self._asha.total_steps)
        for row in metrics_log.read(self._job.run.metrics):
            if row["step"] in steps and row.get(metric) is not None:
                self._last = {"step": row["step"], metric: float(row[metric])}
                return self._last
        return None

    def _end(self) -> None:
        """Asks the training, and the finetuning, to save and stop, and waits: then nothing of it is left, in this process
        or on the cluster. What the scheduler stops it would stop again, so that is noted at once."""
        is_running = self._thread is not None and self._thread.is_alive()
        is_judged = self._asha is not None and is_running and not self._is_stopped
        while self._thread is not None and self._thread.is_alive():
            # Again and again: what begins only now has cleared the request of an earlier start.
            for folder in (self._job.run.path, *self._job.run.path.glob("finetune/*/")):
                if folder.is_dir():
                    RunDirectory(folder).stop_request.touch()
            self._thread.join(1.0)
        directory, trial = self._job.directory, self._job.trial
        if is_judged and directory.training(trial.hash) == "stopped":
            directory.note_done(self._job.sweep, trial, {}, "stopped")


def _return_memory() -> None:
    """Gives the system what the last trial has freed: each runs in a new thread, which would not find it again."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


class _Lines(Callback):
    """A line for each trial that ends; and the failures that no process could note itself, since it died."""

    def __init__(self, pattern: Job, count: int, attempts: int, say: Say) -> None:
        self._pattern, self._count, self._attempts_each, self._say = pattern, count, attempts, say
        self._ended = 0
        self._failed: dict[str, int] = {}
        """Tune's name of a trial -> attempts of it that this command has seen fail"""
        self._began: dict[str, float] = {}
        self._known: dict[str, int] = {}
        """Tune's name of a trial -> failures of it that were noted before, by this command or an earlier one"""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._began[trial.trial_id] = time.monotonic()
        self._known[trial.trial_id] = self._attempts(self._job(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        job = self._job(trial)
        if not RunDirectory(job.directory.path).stop_request.exists():
            self._say(f"{self._number()} {job.trial.title}: {_result(job.run)}, {self._seconds(trial)}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(f"again {self._job(trial).trial.title}: {self._failure(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(f"{self._number()} {self._job(trial).trial.title}: {self._failure(trial)}")

    def _job(self, trial: Any) -> Job:
        return replace(self._pattern, trial=self._pattern.sweep.trial(dict(trial.config["point"])))

    def _failure(self, trial: Any) -> str:
        job = self._job(trial)
        if self._attempts(job) == self._known.get(trial.trial_id, 0):
            lines = [line.strip() for line in str(trial.get_error() or "").splitlines() if line.strip()]
            job.directory.note_failure(job.trial, lines[-1] if lines else "its process died")
        self._known[trial.trial_id] = self._attempts(job)
        failed = self._failed[trial.trial_id] = self._failed.get(trial.trial_id, 0) + 1
        each = max(failed, self._attempts_each)  # a node that goes away costs the trial no attempt
        return f"attempt {failed} of {each} failed: {job.directory.failures()[job.trial.hash]['reason']}"

    def _attempts(self, job: Job) -> int:
        return int(job.directory.failures().get(job.trial.hash, {}).get("attempts", 0))

    def _number(self) -> str:
        self._ended += 1
        return f"{self._ended}/{self._count}"

    def _seconds(self, trial: Any) -> str:
        return f"{time.monotonic() - self._began.get(trial.trial_id, time.monotonic()):.0f} s"


def _result(run: RunDirectory) -> str:
    """The figures of a trial that has ended, in words."""
    if not run.summary.exists():
        return "stopped by the scheduler"
    found = json.loads(run.summary.read_text())
    shown = {"mrr/mrr": "MRR", "linear/top1": "linear", "attentive/top1": "attentive"}
    figures = [
        f"{word} {found['metrics'][name]:.3f}" for name, word in shown.items() if name in found["metrics"]
    ]
    return f"{found['status']} at step {found['steps']}, {found['health']}" + "".join(
        f", {each}" for each in figures
    )


def _tags(trial: Trial) -> dict[str, str]:
    """By which MLflow's table is filtered, grouped and plotted."""
    short = short_names(trial.point)
    named = {short[axis]: value for axis, value in trial.point.items()}
    group = {name: value for name, value in named.items() if name != SEED}
    return {"mlflow.runName": trial.short_title, "iwm.group": words(group)} | {
        f"iwm.axis.{name}": value for name, value in group.items()
    }


def _reason(error: BaseException) -> str:
    if isinstance(error, UsageError | RunError):
        return str(error)  # a sentence for a person
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
