"""From rows to batches: tensors on the training device, and the loader of runs without Ray."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iwm_ray.batch import Batch
from iwm_ray.errors import RunError
from iwm_ray.feed import Columns, Rows
from iwm_ray.views.device import device_views
from iwm_ray.views.policy import ViewPolicy

_IMAGES = 4  # dimensions of an image column


def to_tensors(columns: Columns) -> dict[str, Tensor]:
    """The same columns as CPU tensors. Images share the memory of their columns, which may be an object in Ray's store:
    nobody writes to them. The others are copied where they may not be written, since a step's counters are kept for
    longer than its images, and would keep those in the store."""
    return {
        name: torch.from_numpy(_alias(values) if values.ndim == _IMAGES else _writeable(values))
        for name, values in columns.items()
    }


def to_batch(columns: dict[str, Tensor], policy: ViewPolicy, device: torch.device) -> Batch:
    """Moves columns to the training device; where rows hold crops, makes both views there."""

    def move(name: str) -> Tensor:
        return columns[name].to(device, non_blocking=True)

    if "crop" in columns:
        source, target = device_views(move("crop"), policy.unpack(columns["draws"].numpy()), policy)
    else:
        source, target = move("source").permute(0, 3, 1, 2), move("target").permute(0, 3, 1, 2)
    return Batch(
        source=source,
        target=target,
        action=move("action"),
        context_idx=move("context_idx").long(),
        target_idx=move("target_idx").long(),
        weight=move("weight"),
        counter=move("counter"),
    )


def local_columns(
    feed: Rows, batch_size: int, start: int, until: int, num_processes: int, pin: bool
) -> Iterator[dict[str, Tensor]]:
    """The global batches of steps `start` to `until - 1`, in order, made by processes of this machine; 0: by this one."""
    steps = _Steps(feed, batch_size, until)
    if not num_processes:
        return (steps[step] for step in range(start, until))
    loader = DataLoader(
        steps,
        sampler=range(start, until),
        batch_size=None,
        num_workers=num_processes,
        pin_memory=pin,
        prefetch_factor=4,
        multiprocessing_context="spawn",
    )
    with _children_deaf_to_ctrl_c():
        return _alive(iter(loader))


def _alive(batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    try:
        yield from batches
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):  # torch's words for a process that was killed
            raise
        raise RunError(
            "a process that makes the views died, for lack of memory or over an image; the same command resumes the run "
            "and looks for such an image first"
        ) from None


@contextmanager
def _children_deaf_to_ctrl_c() -> Iterator[None]:
    """A terminal sends Ctrl-C to all processes of a command; data processes that died of it would fail the run before
    it is saved. They inherit the blocked signal of the thread that starts them."""
    resource_tracker.ensure_running()  # its start would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class _Steps(Dataset[dict[str, Tensor]]):
    """Global batch k under the index k."""

    feed: Rows
    batch_size: int
    total: int

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        size = self.batch_size
        return to_tensors(self.feed.rows(np.arange(step * size, (step + 1) * size)))


def _alias(values: NDArray[Any]) -> NDArray[Any]:
    """The same memory without the flag that it may not be written, at which torch would warn."""
    return values if values.flags.writeable else np.asarray(_Memory(values))


class _Memory:
    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values  # kept alive
        address, _ = values.__array_interface__["data"]
        self.__array_interface__ = values.__array_interface__ | {"data": (address, False)}


def _writeable(values: NDArray[Any]) -> NDArray[Any]:
    return values if values.flags.writeable and values.flags.c_contiguous else values.copy()
