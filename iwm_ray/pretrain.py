"""`python -m iwm_ray.pretrain [RECIPE] [--section.field VALUE ...]`: trains an Image World Model.

The driver of a run: checks everything, starts the workers, shows progress, passes signals on, writes the summary. The
heavy imports stand inside the functions, so that a mistake on the command line is answered at once.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from iwm_ray import cli
from iwm_ray.config import Config
from iwm_ray.driver import TRACKER_STATUS, Stop, beside, connect, preflight, train
from iwm_ray.errors import RunError
from iwm_ray.run_directory import RunDirectory

if TYPE_CHECKING:
    from iwm_ray.build import Setup
    from iwm_ray.runtime.tracking import NullTracker
    from iwm_ray.workers import Outcome


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code."""
    sys.exit(cli.run_command(_main, sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> None:
    # Threads that spin while they wait take the CPU from the data tasks beside them (five times slower, measured).
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    command, debug = cli.parse_pretrain(arguments)
    config = command.config
    run = RunDirectory((command.output or Path("runs") / f"{config.recipe}-{config.hash()}").absolute())
    run.check(config)
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and run.path.is_relative_to(Path.cwd()):
        warning = f"--output {run.path} lies in the submitted job's own folder, which Ray removes"
        print(f"warning: {warning}; give --output a folder that stays", file=sys.stderr)
    resources = preflight(config)
    setup = _build(config, run)
    if command.dry_run:
        from iwm_ray.plan_report import plan_lines

        print("\n".join([*plan_lines(setup), f"  resources  {resources}"]))
        return
    pretrain(setup, debug)


def pretrain(setup: "Setup", debug: bool = False) -> None:
    """Trains to the end, or to the step at which a signal stops the run; prints the summary.

    Raises:
        UsageError: the run directory is in use, or began with other images.
        RunError: the run failed; the same command resumes it.
        SystemExit: a signal stopped the run, after saving (130 or 143).
    """
    from iwm_ray import summary
    from iwm_ray.training import metrics_log

    stop = Stop(setup.run)
    with setup.run.lock():
        setup.run.create(setup.config, setup.feed.index.hash)
        forget_mended_samples(setup)
        with tracker_of(setup) as tracker:
            outcome = summary.finished(setup.run) or _train(setup, stop, debug)
            if setup.feed.quarantine and outcome.status != "failed":
                setup.feed.quarantine.clear_marks()
            result = summary.summarise(setup, outcome)
            tracker.log_tags(summary.tags(result))
            for picture in sorted(setup.run.pictures.glob("*.png")):
                tracker.log_picture(picture)
            tracker.finish(TRACKER_STATUS[outcome.status])
        if outcome.status == "failed":
            raise RunError(f"{outcome.message}; the same command resumes the run")
        rows = metrics_log.read(setup.run.metrics)
        print("\n".join(summary.lines(setup, result, rows, _ui_command(tracker))), flush=True)
    if outcome.status == "stopped":
        sys.exit(stop.exit_code)


def _build(config: Config, run: RunDirectory) -> "Setup":
    from iwm_ray.build import build
    from iwm_ray.progress import scanning

    return build(config, run, scanning(config.data.path))


def forget_mended_samples(setup: "Setup") -> None:
    """Takes samples that can be read again off the quarantine: they were mended, or their storage was away."""
    if setup.feed.quarantine:
        setup.feed.quarantine.forget_mended(setup.feed.index, setup.feed.limits)


def tracker_of(setup: "Setup", more_tags: Mapping[str, str] | None = None) -> "NullTracker":
    """The tracker of a run, not started yet; `mlflow.parentRunId` among the tags makes it a child."""
    from iwm_ray.runtime import tracking

    if importlib.util.find_spec("mlflow") is None:
        return tracking.NullTracker()
    tags = {"iwm.run_directory": str(setup.run.path)} | dict(more_tags or {})
    tracker = tracking.open_tracker(setup.run.path, setup.config, setup.run.path.name, tags)
    data = setup.config.data
    tracker.log_dataset(data.path, setup.feed.index.hash, data.path, "training", len(setup.feed.index))
    if setup.test_index:
        tracker.log_dataset(
            data.test_path, setup.test_index.hash, data.test_path, "evaluation", len(setup.test_index)
        )
    return tracker


def _ui_command(tracker: "NullTracker") -> str:
    from iwm_ray.runtime import tracking

    return "" if tracker.uri == "none" else tracking.ui_command(tracker.uri)


def _train(setup: "Setup", stop: Stop, debug: bool) -> "Outcome":
    """Runs the workers beside a loop that shows progress and passes signals on."""
    from iwm_ray import summary
    from iwm_ray.progress import Progress

    summary.note_start(setup.run)
    trainer = trainer_of(setup, debug)
    progress = Progress(setup.run, setup.total_steps, setup.batch_size)
    with stop.listening():
        outcome = beside(progress.show, trainer)
        progress.close()
    return outcome


def trainer_of(setup: "Setup", debug: bool = False) -> Callable[[], "Outcome"]:
    """What trains the run to its end or to a stop request, by the engine of its configuration."""
    from iwm_ray.build import cache_folder
    from iwm_ray.session import work

    folders = {"--output": setup.run.path, "runtime.cache": cache_folder(setup.config)}
    connect(setup.config, folders, debug)
    return lambda: train(setup, work)


if __name__ == "__main__":
    main()
