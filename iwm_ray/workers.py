"""A group of workers that trains something: a pretraining, or one arm of a tuning. What both share, with or without Ray.

The runtime decides where workers run and where their columns come from; nothing here imports ray or mlflow.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from iwm_ray.config import RuntimeConfig
from iwm_ray.errors import RunError, SupersededError, UsageError
from iwm_ray.feed import Rows
from iwm_ray.loader import local_columns
from iwm_ray.run_directory import RunDirectory
from iwm_ray.training import checkpoint


class Training(Protocol):
    """What a group of workers trains; small, so that it travels to each of them."""

    @property
    def run(self) -> RunDirectory:
        """Where checkpoints and metrics are."""
        ...

    @property
    def runtime(self) -> RuntimeConfig: ...

    @property
    def batch_size(self) -> int:
        """Rows of a step, over all workers; the number of workers divides it."""
        ...

    @property
    def total_steps(self) -> int: ...

    @property
    def feed(self) -> Rows | None:
        """The stream that data tasks make; None: each worker reads its rows itself."""
        ...

    @property
    def data_processes(self) -> int:
        """Without Ray: processes that make the rows; 0: the worker itself."""
        ...


@dataclass(frozen=True)
class Worker:
    """Which part of the group this process is."""

    rank: int
    count: int
    device: torch.device

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all workers, the same on each; no host waits for it."""
        return self.sum(value / self.count)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all workers, the same on each."""
        if self.count > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value


@dataclass(frozen=True)
class Outcome:
    """How a worker's part ended."""

    status: Literal["finished", "stopped", "failed"]
    step: int
    message: str = ""


OpenColumns = Callable[[int], Iterator[dict[str, Tensor]]]
"""From a step, this worker's columns of that step and all later ones."""
AnyTraining = TypeVar("AnyTraining", bound=Training)
Work = Callable[[AnyTraining, Worker, OpenColumns], Outcome]
"""A worker's part in a training, from the newest valid checkpoint to the end."""


def train_here(training: AnyTraining, work: Work[AnyTraining]) -> Outcome:
    """A training in this process, without Ray: on the GPU if asked for, with data made by processes of this machine."""
    device = torch.device("cuda" if training.runtime.use_gpu else "cpu")
    feed = training.feed

    def open_columns(step: int) -> Iterator[dict[str, Tensor]]:
        if feed is None:
            return iter(())
        until, processes = training.total_steps, training.data_processes
        return local_columns(feed, training.batch_size, step, until, processes, pin=device.type == "cuda")

    return work(training, Worker(0, 1, device), open_columns)


def guarded(run: RunDirectory, worker: Worker, work: Callable[[], Outcome]) -> Outcome:
    """Does a worker's part. A failure that a restart can't mend comes back as an outcome, so that nobody tries for ever.

    Where other workers wait for this one, it is noted in the run directory and raised: the restarted group then reads
    the note and ends.
    """
    if run.failure.exists():
        return Outcome("failed", -1, run.failure.read_text())
    try:
        return work()
    except SupersededError:  # that is this attempt's end, not the run's
        raise
    except (RunError, UsageError) as error:
        if worker.count == 1:
            return Outcome("failed", -1, str(error))
        run.failure.write_text(str(error))
        raise


def begin(run: RunDirectory, worker: Worker, runtime: RuntimeConfig) -> int:
    """Begins an attempt on every worker: from here on no older one can write, and all find the same newest checkpoint.

    Returns:
        The attempt's generation number; 0 for all but rank 0, which alone writes.
    """
    if worker.device.type == "cpu":
        torch.set_num_threads(_num_threads(runtime, worker.count))
    torch.set_float32_matmul_precision("high")
    generation = checkpoint.next_generation(run.checkpoints) if worker.rank == 0 else 0
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return generation


def resume(run: RunDirectory, worker: Worker, state: checkpoint.State) -> checkpoint.Found | None:
    """Puts the newest valid checkpoint, where there is one, into `state`."""
    found = checkpoint.newest_valid(run.checkpoints)
    if found:
        checkpoint.load(found, state)
        if worker.rank == 0:
            for line in found.skipped:
                run.warn(f"checkpoint passed over: {line}")
    return found


def resume_step(checkpoints: Path) -> int:
    """The step after which a run goes on: that of its newest valid checkpoint, or 0."""
    found = checkpoint.newest_valid(checkpoints)
    return found.step if found else 0


def shared(model: nn.Module, worker: Worker, is_always_whole: bool = True) -> nn.Module:
    """The model, or what averages its gradients over the workers (DDP).

    Args:
        model: on the worker's device; its only buffers are constants: nothing to broadcast.
        worker: where there are others, all call this.
        is_always_whole: whether every trained parameter takes part in every step.
    """
    if worker.count == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=not is_always_whole)


def agree_to_stop(stop_request: Path, worker: Worker) -> bool:
    """Whether rank 0 has found a stop request; where there are several workers, all of them ask at the same step."""
    wanted = worker.rank == 0 and stop_request.exists()
    if worker.count == 1:
        return wanted
    return bool(worker.sum(torch.tensor(int(wanted), device=worker.device)).item())


def checkpoint_every(runtime: RuntimeConfig, total_steps: int) -> int:
    """Steps between two checkpoints."""
    return runtime.checkpoint_every_steps or max(1, min(1000, total_steps // 10))


def _num_threads(runtime: RuntimeConfig, num_workers: int) -> int:
    """Threads that must wait for a CPU, because the data tasks hold it, slow all others down: leave them theirs."""
    spare = len(os.sched_getaffinity(0)) - int(runtime.data_cpus)
    return runtime.threads_per_worker or max(1, spare // num_workers)
