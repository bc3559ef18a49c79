"""What the process of a command does beside the workers of a training: it checks, starts them, shows progress, passes
signals on."""

import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from iwm_ray.config import Config
from iwm_ray.errors import UsageError
from iwm_ray.run_directory import RunDirectory

if TYPE_CHECKING:
    from iwm_ray.workers import AnyTraining, Outcome, Work

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
_POLL_SECONDS = 0.25
# Launchers signal the process and its group: what comes at once is one request.
_ONE_REQUEST_SECONDS = 1.0
TRACKER_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
Result = TypeVar("Result")


def preflight(config: Config) -> str:
    """Checks that a training can start where it would run.

    Returns:
        One line: what is asked and what is there.

    Raises:
        UsageError: more is asked than there is, with the fix.
    """
    check_tracking(config)
    if config.runtime.engine == "local":
        return _preflight_here(config)
    require_ray("runtime.engine ray")
    from iwm_ray.runtime import cluster

    return cluster.preflight(config)


def check_tracking(config: Config) -> None:
    """Warns of a store that is away.

    Raises:
        UsageError: one that cannot be used.
    """
    from iwm_ray.runtime import tracking

    warning = tracking.check_uri(config)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)


def require_ray(setting: str) -> None:
    """Raises UsageError where Ray is not installed, for which this setting asks."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError(f"{setting}: ray is not installed; pip install 'ray[data,default,train,tune]'")


def _preflight_here(config: Config) -> str:
    """`preflight` of engine local."""
    refuse_workers(config)
    if config.runtime.use_gpu:
        import torch

        if not torch.cuda.is_available():
            raise UsageError("runtime.use_gpu True: torch sees no GPU here; set runtime.use_gpu False")
    return f"this process, {os.cpu_count()} CPUs"


def refuse_workers(config: Config) -> None:
    """Raises UsageError where engine local is to have several workers."""
    if config.runtime.num_workers > 1:
        raise UsageError(
            f"runtime.num_workers {config.runtime.num_workers}: engine local has one worker; set runtime.engine ray"
        )


def connect(config: Config, folders: dict[str, Path], debug: bool = False) -> None:
    """Connects to the cluster, for engine ray, and has its nodes look at folders that they share.

    Args:
        config: what is asked.
        folders: setting -> the folder that it names.
        debug: print what the workers print.

    Raises:
        UsageError: there is no cluster, or a node does not see a folder.
    """
    if config.runtime.engine == "local":
        return
    from iwm_ray.runtime import cluster

    cluster.connect(config, debug)
    for setting, folder in folders.items():
        cluster.check_shared_directory(folder, setting)


def train(training: "AnyTraining", work: "Work[AnyTraining]") -> "Outcome":
    """Runs a training to its end or to a stop request, by the engine of its configuration; see `connect`."""
    if training.runtime.engine == "local":
        from iwm_ray.workers import train_here

        return train_here(training, work)
    from iwm_ray.runtime.train import train_on_ray

    return train_on_ray(training, work)


def beside(show: Callable[[], None], act: Callable[[], Result]) -> Result:
    """Acts in a thread and, beside it, shows progress, so that this process answers to signals at once."""
    result: list[Result] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(act())
        except BaseException as error:  # raised again below
            failure.append(error)

    thread = threading.Thread(target=run, name="training", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        show()
    if failure:
        raise failure[0]
    return result[0]


class Stop:
    """Turns the first Ctrl-C or SIGTERM into a request to save and stop, the second into an end."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self.received: signal.Signals | None = None
        self._received_at = 0.0

    @property
    def exit_code(self) -> int:
        """Of a command that was stopped."""
        return EXIT_CODES[self.received] if self.received else 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._receive) for number in EXIT_CODES}
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
            os._exit(EXIT_CODES[signal.Signals(number)])
        self.received, self._received_at = signal.Signals(number), time.monotonic()
        with suppress(OSError):  # a full disk or a lost mount: the second signal still ends the run
            self._run.stop_request.touch()
        os.write(1, b"\nsaving and stopping; once more to stop at once\n")
