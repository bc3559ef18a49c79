"""The stream of a run's samples as one Ray Data pipeline: counters -> rows, made by tasks on CPU nodes."""

import copy

import ray.data
from ray.data import DataContext, Dataset, ExecutionOptions

from iwm_ray.config import Config
from iwm_ray.feed import Columns, Feed

# glibc hands out arrays below 32 MiB from memory that it keeps; larger ones come from the system page by page.
_BLOCK_BYTES = 30 * 2**20
# Starting a task costs about as much as making two images, so a task makes several blocks where they are small.
_TASK_BYTES = 2 * _BLOCK_BYTES
# Ray cuts what a function yields where it exceeds a block's target size: one made for each block, a little smaller.
_TARGET_SHARE = 0.9
_COUNTERS_PER_READ = 2**17
# A task whose process dies (a decoder that crashes, no memory) is tried again this often; Ray's default is for ever.
_TASK_RETRIES = 3


def block_rows(config: Config, feed: Feed) -> int:
    """Rows of a block: the largest divisor of a worker's batch that fits in 30 MiB. The splitter deals whole blocks to
    the workers in turn, so global batch k gets the same samples for every worker count."""
    size, most = config.worker_batch_size, max(1, _BLOCK_BYTES // feed.row_bytes)
    return max(rows for rows in range(1, min(size, most) + 1) if size % rows == 0)


def stream(config: Config, feed: Feed, start: int, until: int) -> Dataset:
    """The rows of steps `start` to `until - 1`, all epochs in one pipeline, in the order of the counters.

    Every block has exactly `block_rows` rows. `repartition` cuts the counters into tasks; it must be strict, or it
    would leave a remainder behind each block of counters.
    """
    rows = block_rows(config, feed)
    size = config.optimizer.global_batch_size
    first, count = start * size, (until - start) * size
    blocks_per_task = max(1, _TASK_BYTES // (rows * feed.row_bytes))

    def make_rows(counters: Columns) -> Columns:
        return feed.rows(first + counters["id"])

    with DataContext.current(_context(rows * feed.row_bytes)):
        counters = ray.data.range(count, override_num_blocks=-(-count // _COUNTERS_PER_READ))
        tasks = counters.repartition(target_num_rows_per_block=rows * blocks_per_task, strict=True)
        return tasks.map_batches(
            make_rows,
            batch_size=rows,
            batch_format="numpy",
            ray_remote_args_fn=lambda: {"max_retries": _TASK_RETRIES},
        )


def execution_options(config: Config) -> ExecutionOptions:
    """Order by counter, not by arrival; tasks on the nodes that `runtime.data_label` names."""
    key, _, value = config.runtime.data_label.partition("=")
    return ExecutionOptions(preserve_order=True, label_selector={key: value} if key else None)


def _context(block_bytes: int) -> DataContext:
    """Ray Data's settings for the stream alone."""
    context = copy.deepcopy(DataContext.get_current())
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.actor_init_retry_on_errors = False
    context.target_max_block_size = int(block_bytes * _TARGET_SHARE)
    return context
