"""Prediction on a real cluster; the command itself is tested in tests/test_predict.py."""

from pathlib import Path

import pytest

import iwm_ray
from iwm_ray.config import DataConfig, RuntimeConfig
from iwm_ray.data.decode import DecodeLimits
from iwm_ray.data.index import Index
from iwm_ray.finetune import main as finetune
from iwm_ray.prediction import Labels, Predictor


@pytest.mark.ray
def test_a_cluster_gives_the_rows_of_this_process(ray_cluster, clean_run, photo_cache, tmp_path):
    words = "--data.path photos_tiny --data.test-path photos_tiny:test --steps 2 --batch-size 8 --data.num-train 16"
    with pytest.raises(SystemExit) as ended:
        finetune(
            [
                str(clean_run),
                *words.split(),
                "--data.num-test",
                "8",
                "--seeds",
                "0",
                "--output",
                str(tmp_path),
            ]
        )
    assert ended.value.code == 0
    adapter: Path = next((tmp_path / "adapters").iterdir())
    data = DataConfig(path="photos_tiny:test")
    index, names = Index.open(data, data.path, photo_cache), iwm_ray.load(adapter).class_names
    found = [
        [
            row
            for table in Predictor(
                adapter, "", None, Labels(names, 2), index, DecodeLimits.from_config(data), runtime
            ).rows()
            for row in table.to_pylist()
        ]
        for runtime in (
            RuntimeConfig(engine="local"),
            RuntimeConfig(engine="ray", num_workers=2, use_gpu=False),
        )
    ]
    assert len(found[0]) == len(index) > 128
    assert [(row["row_id"], row["class"]) for row in found[0]] == [
        (row["row_id"], row["class"]) for row in found[1]
    ]
    for one, other in zip(*found, strict=True):
        assert one["top_probabilities"] == pytest.approx(other["top_probabilities"], abs=1e-5)
