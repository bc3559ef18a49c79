import weakref

import numpy as np
import pytest
import torch

from iwm_ray.build import build
from iwm_ray.loader import local_columns, to_batch, to_tensors
from iwm_ray.recipes import photos_tiny
from iwm_ray.run_directory import RunDirectory


@pytest.fixture(scope="module")
def setups(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    base = photos_tiny()
    runtime = base.runtime.model_copy(update={"cache": str(folder / "cache")})
    optimizer = base.optimizer.model_copy(update={"global_batch_size": 16})
    found = {}
    for where in ("host", "device"):
        views = base.views.model_copy(update={"where": where})
        config = base.model_copy(update={"runtime": runtime, "optimizer": optimizer, "views": views})
        found[where] = build(config, RunDirectory(folder / where))
    return found


def test_views_made_on_the_device_agree_with_those_of_the_host(setups):
    batches = {
        where: to_batch(to_tensors(setup.feed.rows(np.arange(64))), setup.policy, torch.device("cpu"))
        for where, setup in setups.items()
    }
    host, device = batches["host"], batches["device"]
    for name in ("action", "context_idx", "target_idx", "weight", "counter"):
        assert torch.equal(getattr(host, name), getattr(device, name))
    for name in ("source", "target"):
        difference = (getattr(host, name).int() - getattr(device, name).int()).abs()
        assert (difference <= 2).float().mean() > 0.999
        assert difference.float().mean() < 0.5


@pytest.mark.filterwarnings("error")
def test_tensors_share_the_memory_of_images_alone():
    columns = {"source": np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3), "counter": np.arange(5)}
    for values in columns.values():
        values.flags.writeable = False
    tensors = to_tensors(columns)
    for name, shared in (("source", True), ("counter", False)):
        assert np.shares_memory(tensors[name].numpy(), columns[name]) == shared
        np.testing.assert_array_equal(tensors[name].numpy(), columns[name])


def test_shared_memory_lives_as_long_as_its_tensor():
    values = np.full((8, 64, 64, 3), 7, np.uint8)
    values.flags.writeable = False
    alive = weakref.ref(values)
    tensor = to_tensors({"source": values})["source"]
    del values
    assert alive() is not None
    assert (tensor == 7).all()
    del tensor
    assert alive() is None


def test_the_local_loader_keeps_the_order_of_the_plan(setups):
    feed = setups["host"].feed
    for step, columns in enumerate(local_columns(feed, 16, 3, 8, num_processes=2, pin=False), start=3):
        expected = feed.rows(np.arange(step * 16, (step + 1) * 16))
        for name, values in expected.items():
            np.testing.assert_array_equal(columns[name].numpy(), values)
    assert step == 7
