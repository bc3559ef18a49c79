"""One trial of a sweep, wherever it runs: pretraining, measurements, finetuning with its controls.

Each part goes on where an earlier attempt left it, and costs nothing where it is done.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from iwm_ray import summary
from iwm_ray.build import build, cache_folder
from iwm_ray.config import Config
from iwm_ray.driver import TRACKER_STATUS
from iwm_ray.errors import RunError, UsageError
from iwm_ray.evaluate import open_measurement, track
from iwm_ray.evaluation.settings import EvaluateConfig
from iwm_ray.finetuning.settings import FinetuneConfig
from iwm_ray.pretrain import forget_mended_samples, tracker_of, trainer_of
from iwm_ray.run_directory import RunDirectory
from iwm_ray.sweeping.job import Job
from iwm_ray.trained import Trained

if TYPE_CHECKING:
    from iwm_ray.workers import Outcome

_LOCK_SECONDS = 30.0  # a driver that was killed takes its trials with it, but not at once


def run_trial(job: Job) -> None:
    """Runs what is left of a trial.

    Raises:
        UsageError, RunError: it failed; what it has done stays and counts in the next attempt.
    """
    run, seconds, config = job.run, {}, job.trial.config
    if run.path.is_file():
        raise UsageError(f"{run.path}: is a file where the trial's folder belongs; remove it")
    is_first = not run.attempts.exists()
    begin = time.monotonic()
    outcome = train(config, run, job.tags)
    seconds["train"] = time.monotonic() - begin
    if outcome.status == "failed":
        raise RunError(outcome.message)
    if outcome.status == "stopped":
        return
    run.stop_request.unlink(missing_ok=True)  # of an attempt before; who asks now does so again and again
    begin = time.monotonic()
    if not evaluate(job):
        return
    seconds["evaluate"] = time.monotonic() - begin
    if job.sweep.finetune is not None:
        begin = time.monotonic()
        finetune_trial(job, job.sweep.finetune)
        seconds["finetune"] = time.monotonic() - begin
    # A later attempt has done only the rest: its seconds are not those of the trial.
    known = {name: round(value, 2) for name, value in seconds.items()} if is_first else {}
    job.directory.note_done(job.sweep, job.trial, known)


def train(config: Config, run: RunDirectory, tags: dict[str, str]) -> "Outcome":
    """Pretrains as the command does, without its signals and its words: a stop request in the run directory saves and
    ends it."""
    with _locked(run):
        setup = build(config, run)
        run.create(config, setup.feed.index.hash)
        forget_mended_samples(setup)
        with tracker_of(setup, tags) as tracker:
            outcome = summary.finished(run)
            if outcome is None:
                summary.note_start(run)
                outcome = trainer_of(setup)()
            tracker.log_tags(summary.tags(summary.summarise(setup, outcome)))
            for picture in sorted(run.pictures.glob("*.png")):
                tracker.log_picture(picture)
            tracker.finish(TRACKER_STATUS[outcome.status])
    return outcome


def evaluate(job: Job) -> bool:
    """Measures every task of the sweep, and adds the figures to the run's; False: asked to stop between two of them."""
    trained = Trained.open(job.run.path)
    config = EvaluateConfig(
        data=trained.config.data,
        runtime=job.trial.config.runtime,
        tracking=trained.config.tracking,
        measure=job.sweep.measure,
    )
    measurement = open_measurement(trained, config)
    quiet = replace(measurement, show=lambda task, subject: _say_nothing)
    results = []
    for task in config.measure.tasks:
        if job.run.stop_request.exists():
            return False
        results.append(quiet.run(task))
    track(trained, config, results)
    return not job.run.stop_request.exists()


def finetune_trial(job: Job, config: FinetuneConfig) -> None:
    """Tunes what is asked for, with controls; the figures join the run's, which is the trial's only one in MLflow."""
    from iwm_ray.finetune import finetune
    from iwm_ray.finetuning.experiment import Experiment
    from iwm_ray.tuning_driver import CachedTokens

    trained = Trained.open(job.run.path)
    tracking = config.tracking.model_copy(update={"arms": False})
    config = _on_own_data(config, trained.config).model_copy(update={"tracking": tracking})
    finetune(Experiment.open(trained, config, None, CachedTokens(trained, config)))


def check_finetuning(config: FinetuneConfig, run: Config) -> None:
    """Opens, before anything is trained, the data that a trial of this configuration will be tuned on.

    Raises:
        UsageError: there is none, or it has no labels.
    """
    from iwm_ray.finetuning.data import open_tasks

    open_tasks(_on_own_data(config, run), run, cache_folder(run))


def _on_own_data(config: FinetuneConfig, run: Config) -> FinetuneConfig:
    if config.data.path:
        return config
    if not run.data.test_path:
        raise UsageError(
            "data.test_path: empty; finetuning needs test images of its own; give --data.test-path"
        )
    data = {"path": (run.data.path,), "test_path": (run.data.test_path,)}
    columns = {"image_column": run.data.image_column, "label_column": run.data.label_column}
    names = ("use_gpu", "cpus_per_worker", "threads_per_worker", "data_cpus")
    runtime = {name: getattr(run.runtime, name) for name in names}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data | columns),
            "runtime": config.runtime.model_copy(update=runtime),
        }
    )


@contextmanager
def _locked(run: RunDirectory) -> Iterator[None]:
    """The run's lock, waited for: the attempt before may be dying still."""
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        lock = run.lock()
        try:
            lock.__enter__()
            break
        except UsageError:
            if not run.path.is_dir() or time.monotonic() > until:
                raise
            time.sleep(0.5)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _say_nothing(done: int, total: int) -> None:
    pass
