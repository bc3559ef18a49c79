import numpy as np
import torch

from iwm_ray.config import ViewsConfig
from iwm_ray.evaluation.pairs import draw_pairs
from iwm_ray.views.policy import ViewPolicy

POLICY = ViewPolicy.from_config(ViewsConfig(image_size=16))
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)


def test_pairs_are_the_policys_views_and_actions() -> None:
    pairs = draw_pairs(POLICY, IMAGES, np.array([4, 7, 1]), seed=3, num_pairs=2)
    sides = np.array([20])
    for place, number in enumerate((4, 7, 1)):
        for pair in range(2):
            draws = POLICY.draw(3, np.array([-1 - pair]), np.array([number]), sides, sides)
            source, target = POLICY.views(POLICY.crop(IMAGES[place], draws, 0), draws, 0)
            assert np.array_equal(pairs.source[place, pair].permute(1, 2, 0), source)
            assert np.array_equal(pairs.target[place, pair].permute(1, 2, 0), target)
            assert np.array_equal(pairs.action[place, pair], POLICY.encode(draws)[0])


def test_an_images_pairs_depend_on_its_number_only() -> None:
    whole = draw_pairs(POLICY, IMAGES, np.array([4, 7, 1]), seed=3, num_pairs=3)
    one = draw_pairs(POLICY, IMAGES[1:2], np.array([7]), seed=3, num_pairs=2)
    assert torch.equal(whole.source[1, :2], one.source[0])
    assert torch.equal(whole.action[1, :2], one.action[0])
    assert not torch.equal(whole.action[1, 0], whole.action[1, 1])
    assert not torch.equal(whole.action[0], whole.action[1])
