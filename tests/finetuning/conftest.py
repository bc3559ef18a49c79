"""A tiny trained model and its images, for the parts of a finetuning."""

from pathlib import Path

import pytest

from iwm_ray.finetuning.data import open_tasks
from iwm_ray.finetuning.model import assemble
from iwm_ray.finetuning.settings import FinetuneConfig
from iwm_ray.trained import Trained


@pytest.fixture(scope="session")
def trained(clean_run):
    return Trained.open(clean_run)


@pytest.fixture(scope="session")
def model(trained):
    return trained.load()


@pytest.fixture(scope="session")
def config():
    data = {"path": ["photos_tiny"], "test_path": ["photos_tiny:test"], "num_train": 40, "num_test": 20}
    return FinetuneConfig.model_validate({"batch_size": 16, "data": data})


@pytest.fixture(scope="session")
def task(trained, config):
    return open_tasks(config, trained.config, Path(trained.config.runtime.cache))[0]


@pytest.fixture
def tuned_network(trained, model):
    """`tuned_network(config, tune, start, tasks, seed)`."""

    def make(config, tune="predictor", start="pretrained", tasks=None, seed=0):
        return assemble(trained, model, config, tune, start, tasks or {"photos": 10}, seed)

    return make
