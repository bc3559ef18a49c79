"""The stream of a run's samples as one Ray Data pipeline: counters -> tasks -> rows, made on CPU nodes."""

import copy

import ray.data
from ray.data import DataContext, Dataset, ExecutionOptions
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.interfaces import PhysicalOperator

from iwm_ray.config import Config
from iwm_ray.feed import Columns, Feed

# glibc hands out arrays below 32 MiB from memory that it keeps; larger ones come from the system page by page.
_BLOCK_BYTES = 30 * 2**20
# Starting a task costs about as much as making two images, so a task makes several blocks where they are small.
_TASK_BYTES = 2 * _BLOCK_BYTES
# Ray cuts what a function yields where it exceeds the target size of a block; one block's rows are a little more.
_TARGET_SHARE = 0.9
_COUNTERS_PER_READ = 2**17
_BLOCKS_AHEAD = 16
# A task whose process dies (a decoder that crashes, no memory) is tried again this often; Ray's default is for ever.
_TASK_RETRIES = 3


def block_rows(config: Config, feed: Feed) -> int:
    """Rows of a block: the largest divisor of a worker's batch that fits in 30 MiB. The splitter deals whole blocks
    to the workers in turn, so global batch k gets the same samples for every worker count."""
    size, most = config.worker_batch_size, max(1, _BLOCK_BYTES // feed.row_bytes)
    return max(rows for rows in range(1, min(size, most) + 1) if size % rows == 0)


def stream(config: Config, feed: Feed, start: int, until: int) -> Dataset:
    """The rows of steps `start` to `until - 1`, all epochs in one pipeline, in the order of the counters.

    Every block has exactly `block_rows` rows: `repartition` must be strict, or it would leave a remainder behind each
    block of counters.
    """
    rows = block_rows(config, feed)
    size = config.optimizer.global_batch_size
    blocks_per_task = max(1, _TASK_BYTES // (rows * feed.row_bytes))

    first, count = start * size, (until - start) * size

    def make_rows(counters: Columns) -> Columns:
        return feed.rows(first + counters["id"])

    with DataContext.current(_context(rows * feed.row_bytes)):
        counters = ray.data.range(count, override_num_blocks=-(-count // _COUNTERS_PER_READ))
        tasks = counters.repartition(target_num_rows_per_block=rows * blocks_per_task, strict=True)
        return tasks.map_batches(
            make_rows,
            batch_size=rows,
            batch_format="numpy",
            max_retries=_TASK_RETRIES,
        )


def execution_options(config: Config) -> ExecutionOptions:
    """Order by counter, not by arrival; tasks on the nodes that `runtime.data_label` names."""
    key, _, value = config.runtime.data_label.partition("=")
    return ExecutionOptions(preserve_order=True, label_selector={key: value} if key else None)


class FewCountersAhead(BackpressurePolicy):
    """Lets counters be cut into tasks only while few of them wait.

    Ray bounds by bytes alone how far an operator may run ahead of the next one, and prefers the one that holds the
    fewest. Counters weigh nothing: those of a long run would all be cut before its first row is made.
    """

    def can_add_input(self, op: PhysicalOperator) -> bool:
        """Whether the operator may start another task; the last one, which makes rows, always may."""
        if not op.output_dependencies:
            return True
        return op.num_active_tasks() == 0 and len(self._topology[op].output_queue) < _BLOCKS_AHEAD


def _context(block_bytes: int) -> DataContext:
    """Ray Data's settings for the stream alone."""
    context = copy.deepcopy(DataContext.get_current())
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.actor_init_retry_on_errors = False
    context.op_resource_reservation_ratio = 0.1
    context.target_max_block_size = int(block_bytes * _TARGET_SHARE)
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, FewCountersAhead])
    return context
