"""One Ray cluster for all tests of the runtime."""

import os
from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A local cluster of four CPUs to which this process is connected; its address, also in RAY_ADDRESS.

    Ray's own cleaners look for a cluster on this machine and fail when they find several, unless RAY_ADDRESS
    says which one is meant.
    """
    context = ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    address = context.address_info["gcs_address"]
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = address
    yield address
    ray.shutdown()
    os.environ.pop("RAY_ADDRESS")
    if before is not None:
        os.environ["RAY_ADDRESS"] = before
