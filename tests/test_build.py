import numpy as np
import pytest

from iwm_ray.build import build, hold
from iwm_ray.cli import validate
from iwm_ray.errors import UsageError
from iwm_ray.recipes import photos_tiny
from iwm_ray.run_directory import RunDirectory


def config(cache, **changes):
    tree = photos_tiny().model_dump()
    tree["runtime"]["cache"] = str(cache)
    for name, value in changes.items():
        section, field = name.split("__")
        tree[section][field] = value
    return validate(tree)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_the_parts_of_a_run_fit_together(cache, tmp_path):
    setup = build(config(cache), RunDirectory(tmp_path / "run"))
    rows = setup.feed.rows(np.arange(3))
    assert rows["source"].shape == (3, 32, 32, 3)
    assert rows["action"].shape == (3, setup.policy.action_dim)
    assert rows["context_idx"].shape[1] + rows["target_idx"].shape[1] == 16
    assert setup.encoder_width == 128
    assert setup.total_steps == photos_tiny().schedule.steps


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__path": ""}, "needs --data.path"),
        (
            {"optimizer__global_batch_size": 4096},
            "optimizer.global_batch_size 4096 is more than the 1200 images",
        ),
        ({"encoder__name": "vit_tinny_patch16_224"}, "did you mean vit_tiny_patch16_224"),
        ({"masks__block_scale": (0.9, 1.0)}, "masks."),
        ({"data__path": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(cache, tmp_path, changes, words):
    with pytest.raises(UsageError) as raised:
        build(config(cache, **changes), RunDirectory(tmp_path / "run"))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_held_images_are_a_fixed_choice_without_overlap(cache, tmp_path):
    setup = build(config(cache), RunDirectory(tmp_path / "run"))
    index = setup.feed.index
    first, again = (hold(setup, index, 40, "monitor") for _ in range(2))
    later = hold(setup, index, 40, "monitor", offset=40)
    assert first.images.shape == (40, 32, 32, 3)
    np.testing.assert_array_equal(first.samples, again.samples)
    np.testing.assert_array_equal(first.images, again.images)
    assert not set(first.samples) & set(later.samples)
    assert len(set(first.labels)) > 5
