"""The stream of a run's samples as one Ray Data pipeline: counters -> blocks of rows, made by tasks on CPU nodes.

A row of the Ray Data set is a whole block of samples: Ray then never cuts or joins blocks, so their order, their size
and which worker gets them follow from the counters alone.
"""

import copy
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import DataContext, Dataset, Datasource, ExecutionOptions
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from iwm_ray.config import Config
from iwm_ray.feed import Columns, Feed

# glibc hands out arrays below 32 MiB from memory that it keeps; larger ones come from the system page by page.
_BLOCK_BYTES = 30 * 2**20
# Starting a task costs about as much as making two images, so a task makes several blocks where they are small.
_TASK_BYTES = 2 * _BLOCK_BYTES
_TASKS_PER_READ = 2**14
_BLOCKS_AHEAD = 64
# A task whose process dies (a decoder that crashes, no memory) is tried again this often; Ray's default is for ever.
_TASK_RETRIES = 3


def block_size(config: Config, feed: Feed) -> int:
    """Samples of a block: the largest divisor of a worker's batch that fits in 30 MiB. The splitter deals blocks to the
    workers in turn, so global batch k gets the same samples for every worker count."""
    size, most = config.worker_batch_size, max(1, _BLOCK_BYTES // feed.row_bytes)
    return max(rows for rows in range(1, min(size, most) + 1) if size % rows == 0)


def stream(config: Config, feed: Feed, start: int, until: int) -> Dataset:
    """The samples of steps `start` to `until - 1`, all epochs in one pipeline, in the order of the counters.

    Returns:
        one row for each block of `block_size` samples: the columns of `Feed.rows` with one more axis in front.
    """
    size, rows = config.optimizer.global_batch_size, block_size(config, feed)
    task_rows = rows * max(1, _TASK_BYTES // (rows * feed.row_bytes))

    def make_blocks(task: Columns) -> Iterator[Columns]:
        for first in range(int(task["first"][0]), int(task["end"][0]), rows):
            columns = feed.rows(np.arange(first, first + rows))
            yield {name: values[np.newaxis] for name, values in columns.items()}

    source = Tasks(start * size, until * size, task_rows)
    with DataContext.current(_context()):
        # The source waits most of the time: a CPU that Ray keeps free for it would be lost to the tasks.
        tasks = ray.data.read_datasource(
            source, num_cpus=0, concurrency=1, override_num_blocks=source.num_reads
        )
        return tasks.map_batches(make_blocks, batch_format="numpy", max_retries=_TASK_RETRIES)


def samples_of(blocks: Columns) -> Columns:
    """Columns with one row for each sample, from those of some blocks."""
    return {name: values.reshape(-1, *values.shape[2:]) for name, values in blocks.items()}


def execution_options(config: Config) -> ExecutionOptions:
    """Order by counter, not by arrival; tasks on the nodes that `runtime.data_label` names."""
    key, _, value = config.runtime.data_label.partition("=")
    return ExecutionOptions(preserve_order=True, label_selector={key: value} if key else None)


class Tasks(Datasource):
    """A range of counters, cut into what one task makes: rows of `first` and `end`."""

    def __init__(self, first: int, end: int, task_rows: int) -> None:
        super().__init__()
        self._first, self._end, self._task_rows = first, end, task_rows

    @property
    def num_reads(self) -> int:
        """How many reads, one after another, make the whole range."""
        return -(-(self._end - self._first) // (self._task_rows * _TASKS_PER_READ))

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all rows."""
        return (self._end - self._first) // self._task_rows * 16

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """`num_reads` of them, whatever `parallelism` says."""
        size = self._task_rows * _TASKS_PER_READ
        return [self._read(first, min(first + size, self._end)) for first in range(self._first, self._end, size)]

    def _read(self, first: int, end: int) -> ReadTask:
        step = self._task_rows
        count = -(-(end - first) // step)
        metadata = BlockMetadata(num_rows=count, size_bytes=count * 16, input_files=None, exec_stats=None)
        return ReadTask(lambda: _cut(first, end, step), metadata)


def _cut(first: int, end: int, step: int) -> Iterator[pa.Table]:
    for start in range(first, end, step):
        yield pa.table({"first": [start], "end": [min(start + step, end)]})


class FewBlocksAhead(BackpressurePolicy):
    """Pauses an operator while so many of its blocks wait for the next one.

    Ray bounds this by bytes alone, and a task's counters weigh nothing: those of a whole run, millions, would be read
    before the first image.
    """

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        """0: read nothing; None: no bound."""
        return 0 if len(self._topology[op].output_queue) >= _BLOCKS_AHEAD else None


def _context() -> DataContext:
    """Ray Data's settings for the stream alone."""
    context = copy.deepcopy(DataContext.get_current())
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # byte: every row becomes a block of its own
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, FewBlocksAhead])
    return context
