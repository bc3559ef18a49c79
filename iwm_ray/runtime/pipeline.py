"""The stream of a run's samples as one Ray Data pipeline: counters -> rows, made by tasks on CPU nodes."""


import ray.data
from ray.data import DataContext, Dataset, ExecutionOptions

from iwm_ray.config import Config
from iwm_ray.feed import Columns, Feed

_MAX_BLOCK_ROWS = 64
# A task whose process dies (a decoder that crashes, no memory) is tried again this often; Ray's default is for ever.
_TASK_RETRIES = 3


def block_rows(config: Config) -> int:
    """Rows that one data task makes: the largest divisor of a worker's batch up to 64, so that the splitter, which deals
    whole blocks to the workers in turn, gives global batch k the same samples for every worker count."""
    size = config.worker_batch_size
    return max(rows for rows in range(1, min(size, _MAX_BLOCK_ROWS) + 1) if size % rows == 0)


def stream(config: Config, feed: Feed, start: int, until: int) -> Dataset:
    """The rows of steps `start` to `until - 1`, all epochs in one pipeline, in the order of the counters."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.actor_init_retry_on_errors = False
    size = config.optimizer.global_batch_size
    first = start * size

    def make_rows(block: Columns) -> Columns:
        return feed.rows(first + block["id"])

    counters = ray.data.range((until - start) * size)
    blocks = counters.repartition(target_num_rows_per_block=block_rows(config))
    return blocks.map_batches(make_rows, batch_size=None, batch_format="numpy", max_retries=_TASK_RETRIES)


def execution_options(config: Config) -> ExecutionOptions:
    """Order by counter, not by arrival; tasks on the nodes that `runtime.data_label` names."""
    key, _, value = config.runtime.data_label.partition("=")
    return ExecutionOptions(preserve_order=True, label_selector={key: value} if key else None)
