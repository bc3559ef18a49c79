import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from iwm_ray.config import ViewsConfig
from iwm_ray.evaluation.banks import alone, bank_draws, bank_views, clean_actions
from iwm_ray.views.device import device_views
from iwm_ray.views.draws import Draws
from iwm_ray.views.policy import ViewPolicy

SIZE = 16
VIEWS = ViewsConfig(image_size=SIZE)
POLICY = ViewPolicy.from_config(VIEWS)


def _images(num: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(20, 200, (num, SIZE, SIZE, 3), np.uint8)


def _draws(num_images: int, num_views: int, seed: int = 0) -> Draws:
    return bank_draws(POLICY, np.arange(num_images), num_views, seed)


def test_banks_are_keyed_by_seed_and_image_and_grow_at_the_end() -> None:
    small, large = _draws(2, 5, seed=4), _draws(3, 8, seed=4)
    assert np.array_equal(small["target_hue"][:5], large["target_hue"][:5])
    assert np.array_equal(small["target_hue"][5:], large["target_hue"][8:13])
    assert not np.array_equal(small["target_hue"], _draws(2, 5, seed=5)["target_hue"])
    assert len(np.unique(large["target_brightness"])) == 24  # no view without jitter, none twice
    assert large["target_jitter"].all()
    for column in ("flip", "source_jitter", "source_grayscale", "source_blur", "source_solarize"):
        assert not large[column].any()


def test_bank_views_are_the_policys_target_views() -> None:
    image, draws = _images(1)[0], _draws(1, 4)
    expected = [POLICY.views(image, draws, row)[1] for row in range(4)]
    assert np.array_equal(bank_views(POLICY, image, draws), np.stack(expected))


@pytest.mark.parametrize("source_base", ["crop", "target"])
def test_actions_from_the_clean_image_are_the_jitter(source_base: str) -> None:
    policy = ViewPolicy.from_config(ViewsConfig(image_size=SIZE, source_base=source_base))
    draws = bank_draws(policy, np.arange(1), 6, seed=0)
    actions = clean_actions(policy, draws)
    assert actions[:, 0] == pytest.approx((draws["target_brightness"] - 1) / VIEWS.brightness, abs=1e-6)
    assert actions[:, 3] == pytest.approx(draws["target_hue"] / VIEWS.hue, abs=1e-6)
    assert not actions[:, 4:].any()


def test_an_images_bank_depends_on_its_number_only() -> None:
    some, one = bank_draws(POLICY, np.array([9, 4]), 6, seed=2), bank_draws(POLICY, np.array([4]), 6, seed=2)
    assert all(np.array_equal(some[name][6:], one[name]) for name in one)


def test_alone_a_component_keeps_its_values_and_the_others_stay() -> None:
    draws = _draws(1, 5)
    some = alone(POLICY, draws, "hue")
    actions = clean_actions(POLICY, some)
    assert np.array_equal(actions[:, 3], clean_actions(POLICY, draws)[:, 3])
    assert not actions[:, :3].any()
    assert len(np.unique(bank_views(POLICY, _images(1)[0], some), axis=0)) > 1


def test_a_seed_keeps_its_banks_for_ever() -> None:
    brightness = _draws(1, 3)["target_brightness"]
    assert brightness == pytest.approx([0.64451045, 1.2477195, 1.0644114], abs=1e-6)


def test_the_devices_banks_are_the_hosts() -> None:
    """On a GPU the views come from views/device.py; here it runs on the CPU with the same draws."""
    image, draws = _images(1)[0], _draws(1, 20)
    ours = bank_views(POLICY, image, draws).astype(int)
    clean = torch.tensor(image)[None].expand(20, -1, -1, -1)
    theirs = device_views(clean, draws, POLICY)[1].permute(0, 2, 3, 1).numpy().astype(int)
    assert (np.abs(ours - theirs) <= 1).mean() > 0.999
