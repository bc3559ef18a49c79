"""The stream of a run's samples as a Ray Data pipeline: places in the stream -> rows, made by tasks on CPU nodes.

A run may have hundreds of millions of samples, and Ray wants to know all tasks of an execution before the first one
runs. So the stream is cut into segments of a thousand tasks; each time the dataset is iterated it gives the next
segment. The tasks of a segment start only as the trainer takes their rows.
"""

import copy
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import ray
import ray.data
from ray.data import DataContext, Dataset, ExecutionOptions
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.util.annotations import RayDeprecationWarning

from iwm_ray.config import RuntimeConfig
from iwm_ray.feed import MAX_KEPT_ARRAY, Rows

# Starting a task costs about as much as making two images, so a task makes several blocks.
_TASK_BYTES = 120 * 2**20
# Ray cuts what a function yields where it exceeds a block's target size: one made for each block, a little smaller.
_TARGET_SHARE = 0.9
# Ray needs 0.3 ms to take note of a task, before the first one runs: few enough to start soon, enough for minutes.
_TASKS_PER_SEGMENT = 1024
# A task whose process dies (a decoder that crashes, no memory) is tried again this often; Ray's default is for ever.
_TASK_RETRIES = 3


@dataclass(frozen=True)
class Layout:
    """How the samples of steps `start` to `until - 1` are dealt out to blocks, tasks and segments."""

    start: int
    until: int
    batch_size: int
    """samples of a step"""
    block_rows: int
    """rows of every block; divides each worker's batch"""
    task_rows: int
    """rows of a task, whole blocks"""
    segment_steps: int
    """steps of a segment, at most"""

    @classmethod
    def of(cls, feed: Rows, batch_size: int, num_workers: int, start: int, until: int) -> "Layout":
        """Blocks and tasks of a good size for the rows of this feed."""
        rows = block_rows(feed, batch_size // num_workers)
        task_rows = rows * max(1, _TASK_BYTES // (rows * feed.row_bytes))
        segment = max(1, _TASKS_PER_SEGMENT * task_rows // batch_size)
        return cls(start, until, batch_size, rows, task_rows, segment)

    @property
    def num_segments(self) -> int:
        """How often the dataset is to be iterated."""
        return -(-(self.until - self.start) // self.segment_steps)

    def tasks(self, segment: int) -> list[range]:
        """The counters of each task of a segment."""
        first = (self.start + segment * self.segment_steps) * self.batch_size
        last = min(first + self.segment_steps * self.batch_size, self.until * self.batch_size)
        return [range(task, min(task + self.task_rows, last)) for task in range(first, last, self.task_rows)]


def block_rows(feed: Rows, size: int) -> int:
    """Rows of a block: the largest divisor of a worker's batch whose columns fit in memory that is used again (feed.py).
    The splitter deals whole blocks to the workers in turn, so global batch k gets the same samples for every worker
    count."""
    most = max(1, MAX_KEPT_ARRAY // feed.view_bytes)
    return max(rows for rows in range(1, min(size, most) + 1) if size % rows == 0)


def stream(feed: Rows, layout: Layout) -> Dataset:
    """The rows of the layout's steps in the order of the counters, the next segment at each iteration."""
    with DataContext.current(_context(layout.block_rows * feed.row_bytes)), warnings.catch_warnings():
        # Ray 2.60 deprecates the one way to say how often a task is tried again, and names no other.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return ray.data.read_datasource(
            _Stream(feed, layout),
            override_num_blocks=len(layout.tasks(0)),
            ray_remote_args={"max_retries": _TASK_RETRIES},
        )


def execution_options(runtime: RuntimeConfig) -> ExecutionOptions:
    """Order by counter, not by arrival; tasks on the nodes that `runtime.data_label` names."""
    key, _, value = runtime.data_label.partition("=")
    return ExecutionOptions(preserve_order=True, label_selector={key: value} if key else None)


class _Stream(Datasource):
    """Names a segment's tasks to Ray Data."""

    def __init__(self, feed: Rows, layout: Layout) -> None:
        super().__init__()
        # Every task is pickled by itself: what all of them need is stored once.
        self._feed, self._row_bytes, self._layout = ray.put(feed), feed.row_bytes, layout

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        # Ray counts the executions of a dataset here and nowhere else (its own shuffles are seeded by it). Were it
        # to go away, training would refuse the second segment: its rows would be those of other steps.
        segment = data_context._execution_idx if data_context else 0
        return [
            ReadTask(
                functools.partial(_blocks, self._feed, task, self._layout.block_rows),
                BlockMetadata(len(task), len(task) * self._row_bytes, None, None),
            )
            for task in self._layout.tasks(segment)
        ]

    def estimate_inmemory_data_size(self) -> int | None:
        return None


def _blocks(shared: "ray.ObjectRef[Rows]", counters: range, block_rows: int) -> Iterator[Block]:
    feed = ray.get(shared)
    for first in range(counters.start, counters.stop, block_rows):
        columns = feed.rows(np.arange(first, min(first + block_rows, counters.stop)))
        yield BlockAccessor.batch_to_arrow_block(columns)


def _context(block_bytes: int) -> DataContext:
    """Ray Data's settings for the stream alone."""
    context = copy.deepcopy(DataContext.get_current())
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.actor_init_retry_on_errors = False
    context.memory_usage_poll_interval_s = (
        None  # each look at a task's memory takes as long as making some images
    )
    context.target_max_block_size = int(block_bytes * _TARGET_SHARE)
    return context
