"""Measuring on a cluster: the same figures for every number of workers."""

from dataclasses import replace

import numpy as np
import pytest

from iwm_ray.data.decode import DecodeLimits
from iwm_ray.data.index import Index
from iwm_ray.evaluation.settings import EvaluateConfig, MeasureConfig
from iwm_ray.measurement import Measurement
from iwm_ray.trained import Trained

pytestmark = pytest.mark.ray


@pytest.fixture
def measurement(clean_run, photo_cache, tmp_path):
    trained = Trained.open(clean_run)
    data = trained.config.data
    settings = MeasureConfig(images=10, views=8, targets=3, components=False, inverse=False, test_images=300)
    return Measurement(
        trained,
        settings,
        EvaluateConfig().runtime.model_copy(update={"cache": str(tmp_path / "cache")}),
        DecodeLimits.from_config(data),
        Index.open(data, data.path, photo_cache),
        Index.open(data, data.test_path, photo_cache),
        tmp_path / "here",
        lambda task, subject: lambda done, total: None,
    )


def test_figures_do_not_depend_on_the_number_of_workers(ray_cluster, measurement, tmp_path):
    here = {task: measurement.run(task).measured for task in ("mrr", "rank")}
    for workers in (1, 3):
        runtime = measurement.runtime.model_copy(
            update={"engine": "ray", "num_workers": workers, "cache": str(tmp_path / f"cache-{workers}")}
        )
        there = replace(measurement, runtime=runtime, folder=tmp_path / str(workers))
        for task, expected in here.items():
            found = there.run(task).measured
            for subject, metrics in expected.items():
                for name, value in metrics.items():
                    np.testing.assert_allclose(found[subject][name], value, rtol=1e-5, err_msg=name)
