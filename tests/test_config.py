import json

import pytest
from pydantic import ValidationError

from iwm_ray.config import Config


def make(**sections):
    return Config(recipe="test", **sections)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"encoder": {"patch_size": 15}}, ["encoder.patch_size 15", "views.image_size 224", "14, 16"]),
        (
            {"optimizer": {"global_batch_size": 6}, "runtime": {"num_workers": 4}},
            ["6", "num_workers 4", "[1, 2, 3, 6]"],
        ),
        ({"predictor": {"width": 100, "num_heads": 3}}, ["predictor.width 100", "predictor.num_heads 3"]),
        ({"views": {"crop_scale": (0.9, 0.3)}}, ["crop_scale 0.9 0.3"]),
        ({"data": {"background": (0, 0, 300)}}, ["background", "300"]),
        ({"predictor": {"target": "pixels"}}, ["predictor.conditioning feature", "pixels", "use none"]),
        (
            {"predictor": {"target": "pixels", "conditioning": "none"}, "views": {"jitter_probability": 0}},
            ["views.grayscale_probability 0.2", "pixels", "use 0"],
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(sections, words):
    with pytest.raises(ValidationError) as raised:
        make(**sections)
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -1, "fast"])
def test_a_learning_rate_is_a_finite_number(lr):
    with pytest.raises(ValidationError):
        Config.model_validate_json(json.dumps({"recipe": "test", "optimizer": {"lr": lr}}))


def test_unknown_keys_are_refused():
    with pytest.raises(ValidationError, match="lrr"):
        make(optimizer={"lrr": 1e-3})


def test_the_hash_names_what_is_computed_not_where():
    base = make()
    assert base.hash() == make(runtime={"num_workers": 8}, tracking={"uri": "none"}).hash()
    assert base.hash() != make(seed=1).hash()
    assert base.hash() == Config.model_validate_json(base.model_dump_json()).hash()


def test_settings_younger_than_the_first_runs_leave_their_names_alone():
    """A golden hash: it names runs, sweeps and caches that exist; only a change of what is computed may move it."""
    assert make().hash() == "3889af8028bd"
    assert make(masks={"style": "random"}).hash() != make().hash()
    still = {f"{name}_probability": 0 for name in ("jitter", "grayscale", "blur", "solarize")}
    tokens, pixels = (
        make(views=still, predictor={"conditioning": "none", "target": target})
        for target in ("encoder", "pixels")
    )
    assert tokens.hash() != pixels.hash()


def test_rates_and_lengths_are_derived():
    config = make(optimizer={"global_batch_size": 512}, schedule={"epochs": 3})
    assert config.optimizer.peak_lr == pytest.approx(1e-3 / 4)
    assert config.steps_per_epoch(1300) == 2
    assert config.total_steps(1300) == 6
    assert make(schedule={"steps": 7}).total_steps(10**6) == 7
    assert config.grid == (14, 14)
    assert config.predictor_heads == 6


def test_flat_names_are_dotted():
    flat = make().flat()
    assert flat["predictor.conditioning"] == "feature"
    assert flat["views.crop_scale"] == [0.3, 1.0]
    assert flat["seed"] == 0
