from dataclasses import replace

import numpy as np
import pytest

from iwm_ray.build import build
from iwm_ray.cli import validate
from iwm_ray.recipes import photos_tiny
from iwm_ray.run_directory import RunDirectory
from iwm_ray.runtime import pipeline
from iwm_ray.runtime.pipeline import Layout, execution_options, stream

pytestmark = pytest.mark.ray


@pytest.fixture
def make(tmp_path):
    def setup(num_workers):
        tree = photos_tiny().model_dump()
        tree["optimizer"]["global_batch_size"] = 16
        tree["runtime"] |= {"cache": str(tmp_path / "cache"), "num_workers": num_workers}
        tree["tracking"]["action_log_fraction"] = 0.0
        return build(validate(tree), RunDirectory(tmp_path / "run"))

    return setup


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_global_batches_are_those_of_the_plan_for_every_worker_count(
    ray_cluster, make, num_workers, monkeypatch
):
    """Over several segments, the last of them shorter, and tasks of several blocks."""
    import ray

    monkeypatch.setattr(pipeline, "_TASKS_PER_SEGMENT", 3)
    monkeypatch.setattr(pipeline, "_TASK_BYTES", 2 * 16 * 3072)

    setup = make(num_workers)
    config = setup.config
    start, until = 3, 23
    layout = Layout.of(setup.feed, 16, num_workers, start, until)
    assert config.worker_batch_size % layout.block_rows == 0
    assert layout.num_segments > 2
    assert (until - start) % layout.segment_steps
    data = stream(setup.feed, layout)
    data.context.execution_options = execution_options(config.runtime)

    @ray.remote(num_cpus=0)
    def read(shard):
        return [
            batch["counter"].tolist()
            for _ in range(layout.num_segments)
            for batch in shard.iter_batches(batch_size=config.worker_batch_size, batch_format="numpy")
        ]

    shards = data.streaming_split(num_workers, equal=True)
    parts = ray.get([read.remote(shard) for shard in shards], timeout=120)
    assert {len(part) for part in parts} == {until - start}
    for step, batches in enumerate(zip(*parts, strict=True), start=start):
        found = sorted(counter for batch in batches for counter in batch)
        assert found == list(range(step * 16, (step + 1) * 16))


def test_rows_are_those_of_the_feed(ray_cluster, make):
    setup = make(1)
    data = stream(setup.feed, Layout.of(setup.feed, 16, 1, 0, 2))
    data.context.execution_options = execution_options(setup.runtime)
    batches = list(data.iter_batches(batch_size=16, batch_format="numpy"))
    for step, batch in enumerate(batches):
        for name, values in setup.feed.rows(np.arange(step * 16, (step + 1) * 16)).items():
            np.testing.assert_array_equal(batch[name], values)


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize(("size", "rows"), [(224, 128), (384, 64)])
def test_a_column_of_a_block_fits_in_memory_that_is_used_again(make, where, size, rows):
    setup = make(1)
    crop_box = replace(setup.feed.policy.crop_box, size=size)
    feed = replace(setup.feed, where=where, policy=replace(setup.feed.policy, crop_box=crop_box))
    layout = Layout.of(feed, 256, 1, 0, 10)
    assert layout.block_rows == rows
    assert layout.task_rows % rows == 0
