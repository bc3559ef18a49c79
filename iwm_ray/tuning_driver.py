"""Runs the arms of a tuning: in turns, here or on Ray Train, or side by side as Ray Tune trials. Each is resumed where an
attempt before left it, stops when asked, and has an MLflow run of its own, a child of the pretraining's."""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from iwm_ray import driver, summary
from iwm_ray.config import Config
from iwm_ray.driver import TRACKER_STATUS, Stop, beside
from iwm_ray.errors import RunError, UsageError
from iwm_ray.evaluation.encoders import LAST, FrozenEncoder
from iwm_ray.evaluation.features import Features
from iwm_ray.finetuning.arms import Arm
from iwm_ray.finetuning.data import Images
from iwm_ray.finetuning.experiment import cache_of
from iwm_ray.finetuning.settings import TuningConfig
from iwm_ray.finetuning.tuning import ArmTraining, Tuning, work
from iwm_ray.progress import Progress
from iwm_ray.run_directory import RunDirectory
from iwm_ray.runtime.measure import extract
from iwm_ray.runtime.tracking import NullTracker, open_tracker, reopened
from iwm_ray.trained import Trained
from iwm_ray.training.metrics_log import MetricsLog
from iwm_ray.workers import Outcome

if TYPE_CHECKING:
    from iwm_ray.runtime.tune import Room


@dataclass(frozen=True)
class CachedTokens:
    """Tokens by the measuring runtime (Ray Data for engine ray), which keeps them on the disk for the next tuning."""

    trained: Trained
    config: TuningConfig

    def __call__(self, encoder: FrozenEncoder, images: Images) -> Features:
        """See data.Extract."""
        found = extract(
            encoder,
            images.index,
            images.samples,
            runtime=self.config.runtime,
            limits=images.limits,
            cache=cache_of(self.trained, self.config),
            pooled=False,
        )
        return found[LAST]


def preflight(tuning: Tuning) -> str:
    """Checks that the arms can run where they would; one line: what is asked and what is there.

    Raises:
        UsageError: more is asked than there is.
    """
    config = _asked(tuning)
    if tuning.config.runtime.arms != "tune":
        return driver.preflight(config)
    driver.check_tracking(config)
    driver.require_ray("runtime.arms tune")
    if config.runtime.engine == "local":
        driver.refuse_workers(config)  # the GPUs are those of the trials' nodes
    return _room(tuning).line


def run(tuning: Tuning, stop: Stop | None, debug: bool = False) -> None:
    """Trains and measures all arms that are not finished.

    Args:
        tuning: what is run.
        stop: listens to signals, in the main thread of a command; None: nobody does.
        debug: print what workers print.

    Raises:
        RunError: an arm failed.
        SystemExit: a signal stopped it, after saving.
    """
    RunDirectory(tuning.folder).stop_request.unlink(missing_ok=True)
    track(tuning, {}, ())  # the parent of the arms' MLflow runs
    config = _asked(tuning)
    folders = {"--output": tuning.folder, "runtime.cache": Path(config.runtime.cache)}
    if tuning.config.runtime.arms == "tune":
        from iwm_ray.runtime import cluster, tune

        room = _room(tuning)
        tune.connect(config, room, debug)
        for setting, folder in folders.items():
            cluster.check_shared_directory(folder, setting)
        train = _side_by_side(tuning, room)
    else:
        driver.connect(config, folders, debug)
        train = _in_turns(tuning)
    with stop.listening() if stop else nullcontext():
        if not tuning.run(train):
            print("saved; the same command goes on from there", flush=True)
            sys.exit(stop.exit_code if stop else 1)


def train_arm(tuning: Tuning, arm: Arm) -> Outcome:
    """Trains one arm, tracked; its result then is in the folder, unless it was stopped.

    Raises:
        RunError: it failed.
    """
    training = ArmTraining(tuning, arm)
    if RunDirectory(tuning.folder).stop_request.exists():
        return Outcome("stopped", 0)
    training.run.path.mkdir(parents=True, exist_ok=True)
    training.run.failure.unlink(missing_ok=True)
    with _tracker(training) as tracker:
        outcome = driver.train(training, work)
        if outcome.status == "finished":
            figures = {} if tuning.diverged(arm).exists() else tuning.figures(arm)
            MetricsLog(training.run.metrics).correct(outcome.step, figures)
        tracker.finish(TRACKER_STATUS[outcome.status])
    if outcome.status == "failed":
        raise RunError(f"{arm.name}: {outcome.message}")
    tuning.refuse_undecodable()  # of the test images
    return outcome


def track(tuning: Tuning, metrics: Mapping[str, float], files: Sequence[str]) -> None:
    """Adds figures to the run's metrics and to its MLflow run, with files of the folder, unless that is elsewhere.

    The same names may have the figures of a tuning with other settings: the tags `iwm.finetune.<task>` name the folder
    whose figures they are now, and its config.json and summary.json are kept among the artifacts.
    """
    trained, folder = tuning.trained, tuning.folder
    run = RunDirectory(trained.run.path)
    if not folder.is_relative_to(run.path):
        return
    try:
        with reopened(run, _tracked(tuning)) as tracker:
            MetricsLog(run.metrics).correct(trained.step, metrics)
            summary.renew(run)
            tracker.log_tags({f"iwm.{name}": folder.name for name in _tables(metrics)})
            for name in files:
                tracker.log_file(folder / name, f"finetune/{folder.name}")
    except UsageError as error:  # the run is still training, and its directory is its own
        print(f"not tracked: {error}", file=sys.stderr)


def _tables(metrics: Mapping[str, float]) -> set[str]:
    """`finetune.<task>`, with the words for what was tuned, of each table of figures."""
    named = (name for name in metrics if not name.endswith("chance"))  # which no tuning decides
    return {name.rpartition("/")[0].replace("/", ".") for name in named}


def _in_turns(tuning: Tuning) -> Callable[[Sequence[Arm]], bool]:
    """One arm after the other."""

    def train(arms: Sequence[Arm]) -> bool:
        for number, arm in enumerate(arms):
            later = sum(map(tuning.num_images, arms[number + 1 :]))
            run, title = ArmTraining(tuning, arm).run, f"{number + 1}/{len(arms)} {arm.name} · "
            steps = tuning.num_steps_of(arm)
            progress = Progress(run, steps, tuning.batch_size, title=title, later=later)
            outcome = beside(progress.show, lambda arm=arm: train_arm(tuning, arm))  # type: ignore[misc]
            progress.close()
            _say_diverged(tuning, arm, title)
            if outcome.status == "stopped":
                return False
        return True

    return train


def _side_by_side(tuning: Tuning, room: "Room") -> Callable[[Sequence[Arm]], bool]:
    """As many at once as there is room for, as Ray Tune trials."""
    from iwm_ray.runtime import tune

    runtime = tuning.config.runtime
    if runtime.engine == "local":  # as many threads as the trial has CPUs
        threads = runtime.threads_per_worker or max(1, int(runtime.cpus_per_worker))
        runtime = runtime.model_copy(update={"threads_per_worker": threads})
    quiet = replace(tuning, config=tuning.config.model_copy(update={"runtime": runtime}))

    def train(arms: Sequence[Arm]) -> bool:
        names = [arm.name for arm in arms]
        trials = [_Trial(quiet, arm) for arm in arms]
        beside(lambda: None, lambda: tune.run_beside(trials, names, room, max_failures=runtime.max_failures))
        for arm in arms:
            _say_diverged(tuning, arm, f"{arm.name} · ")
        return all(map(tuning.is_finished, arms))

    return train


def _say_diverged(tuning: Tuning, arm: Arm, title: str) -> None:
    if tuning.diverged(arm).exists():
        print(f"{title}diverged, so this rate is not chosen: {tuning.diverged(arm).read_text()}", flush=True)


@dataclass(frozen=True)
class _Trial:
    tuning: Tuning
    arm: Arm

    def __call__(self) -> None:
        train_arm(self.tuning, self.arm)


def _asked(tuning: Tuning) -> Config:
    """The run's configuration as if it were trained as the arms are."""
    cache = {"cache": str(cache_of(tuning.trained, tuning.config))}
    run, runtime = _tracked(tuning), tuning.config.runtime.model_copy(update=cache)
    batch = run.optimizer.model_copy(update={"global_batch_size": tuning.batch_size})
    return run.model_copy(update={"runtime": runtime, "optimizer": batch})


def _tracked(tuning: Tuning) -> Config:
    """The run's configuration, with the store that was asked for."""
    run, uri = tuning.trained.config, tuning.config.tracking.uri
    tracking = run.tracking.model_copy(update={"uri": uri or run.tracking.uri})
    return run.model_copy(update={"tracking": tracking})


def _room(tuning: Tuning) -> "Room":
    from iwm_ray.runtime import tune

    return tune.make_room(_asked(tuning), 1.0, len(tuning.planned()))


def _tracker(training: ArmTraining) -> NullTracker:
    """The arm's MLflow run, not started yet."""
    if importlib.util.find_spec("mlflow") is None or not training.tuning.config.tracking.arms:
        return NullTracker()
    tuning, config = training.tuning, _tracked(training.tuning)
    parent = open_tracker(tuning.trained.run.path, config, tuning.trained.run.path.name)
    if parent.uri == "none":
        return parent
    tags = {"iwm.run_directory": str(training.run.path)}
    if parent.run_id:
        tags["mlflow.parentRunId"] = parent.run_id
    params = tuning.config.flat() | {"arm": training.arm.name}
    return open_tracker(training.run.path, config, f"{tuning.folder.name} {training.arm.name}", tags, params)
