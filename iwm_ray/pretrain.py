"""`python -m iwm_ray.pretrain [RECIPE] [--section.field VALUE ...]`: trains an Image World Model.

The driver of a run: checks everything, starts the workers, shows progress, passes signals on, writes the summary. The
heavy imports stand inside the functions, so that a mistake on the command line is answered at once.
"""

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from iwm_ray import cli
from iwm_ray.config import Config
from iwm_ray.errors import RunError, UsageError
from iwm_ray.run_directory import RunDirectory

if TYPE_CHECKING:
    from iwm_ray.build import Setup
    from iwm_ray.runtime.tracking import NullTracker
    from iwm_ray.session import Outcome

_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
_POLL_SECONDS = 0.25
# Launchers signal the process and its group: what comes at once is one request.
_ONE_REQUEST_SECONDS = 1.0
TRACKER_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


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


def preflight(config: Config) -> str:
    """Checks that the run can start where it would run.

    Returns:
        One line: what is asked and what is there.

    Raises:
        UsageError: more is asked than there is, with the fix.
    """
    from iwm_ray.runtime import tracking

    warning = tracking.check_uri(config)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    if config.runtime.engine == "local":
        return _preflight_here(config)
    if importlib.util.find_spec("ray") is None:
        raise UsageError(
            "runtime.engine ray: ray is not installed; pip install 'ray[data,default,train,tune]'"
        )
    from iwm_ray.runtime import cluster

    return cluster.preflight(config)


def _preflight_here(config: Config) -> str:
    if config.runtime.num_workers > 1:
        raise UsageError(
            f"runtime.num_workers {config.runtime.num_workers}: engine local has one worker; set runtime.engine ray"
        )
    if config.runtime.use_gpu:
        import torch

        if not torch.cuda.is_available():
            raise UsageError("runtime.use_gpu True: torch sees no GPU here; set runtime.use_gpu False")
    return f"this process, {os.cpu_count()} CPUs"


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
        sys.exit(_EXIT_CODES[stop.received] if stop.received else 1)


def _build(config: Config, run: RunDirectory) -> "Setup":
    from iwm_ray.build import build
    from iwm_ray.progress import scanning

    return build(config, run, scanning(config.data.path))


def forget_mended_samples(setup: "Setup") -> None:
    """Takes samples that can be read again off the quarantine: they were mended, or their storage was away."""
    from iwm_ray.data.decode import Undecodable

    records, bad = setup.run.quarantined(), []
    for record in records:
        try:
            setup.feed.image(setup.feed.index.find(record["row_id"]))
        except Undecodable:
            bad.append(record)
    if len(bad) < len(records):
        setup.run.quarantine.write_text("".join(json.dumps(record) + "\n" for record in bad))


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


def _train(setup: "Setup", stop: "Stop", debug: bool) -> "Outcome":
    """Runs the workers beside a loop that shows progress and passes signals on."""
    from iwm_ray import summary
    from iwm_ray.progress import Progress

    summary.note_start(setup.run)
    train = trainer_of(setup, debug)
    result: list[Outcome | BaseException] = []

    def run() -> None:
        try:
            result.append(train())
        except BaseException as error:
            result.append(error)

    progress = Progress(setup.run, setup.total_steps, setup.config.optimizer.global_batch_size)
    thread = threading.Thread(target=run, name="training", daemon=True)
    with stop.listening():
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            progress.show()
        progress.close()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def trainer_of(setup: "Setup", debug: bool = False) -> Callable[[], "Outcome"]:
    """What trains the run to its end or to a stop request, by the engine of its configuration."""
    if setup.config.runtime.engine == "local":
        from iwm_ray.session import train_here

        return lambda: train_here(setup)
    from iwm_ray.build import cache_folder
    from iwm_ray.runtime import cluster
    from iwm_ray.runtime.train import train_on_ray

    cluster.connect(setup.config, debug)
    cluster.check_shared_directory(setup.run.path)
    cluster.check_shared_directory(cache_folder(setup.config), "runtime.cache")
    return lambda: train_on_ray(setup)


class Stop:
    """Turns the first Ctrl-C or SIGTERM into a request to save and stop, the second into an end."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self.received: signal.Signals | None = None
        self._received_at = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._receive) for number in _EXIT_CODES}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # A handler may interrupt a print, so it must not print itself.
        if self.received is not None:
            if time.monotonic() - self._received_at < _ONE_REQUEST_SECONDS:
                return
            os.write(1, b"\nstopped without saving; the same command resumes from the last checkpoint\n")
            os._exit(_EXIT_CODES[signal.Signals(number)])
        self.received, self._received_at = signal.Signals(number), time.monotonic()
        with suppress(OSError):  # a full disk or a lost mount: the second signal still ends the run
            self._run.stop_request.touch()
        os.write(1, b"\nsaving and stopping; once more to stop at once\n")


if __name__ == "__main__":
    main()
