import numpy as np
import pytest
from skimage import data

from iwm_ray.config import MasksConfig, ViewsConfig
from iwm_ray.pictures.sheets import outline, predicted_patches, views_sheet
from iwm_ray.views.masks import MaskSampler
from iwm_ray.views.policy import ViewPolicy


@pytest.mark.parametrize(("size", "patch", "num"), [(32, 8, 3), (224, 16, 2), (48, 16, 1)])
def test_a_row_for_each_sample_and_nothing_overlaps(size: int, patch: int, num: int, legible) -> None:
    policy, grid = ViewPolicy.from_config(ViewsConfig(image_size=size)), (size // patch, size // patch)
    images = [data.astronaut(), data.chelsea(), data.coffee()][:num]
    epochs, samples = np.zeros(num, np.int64), np.arange(num)
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    draws = policy.draw(0, epochs, samples, heights, widths)
    masks = MaskSampler.from_config(MasksConfig(block_scale=(0.15, 0.3)), grid).draw(0, epochs, samples)
    crops = np.stack([policy.crop(image, draws, row) for row, image in enumerate(images)])
    figure = views_sheet(crops, draws, masks, policy, grid)
    assert len(figure.axes) == 5 * num
    texts = legible(figure)
    assert {"shared crop", "source view", "context (seen)", "targets (predicted)", "action"} <= set(texts)
    assert texts.count("brightness") == num


def test_the_views_shown_are_the_policys() -> None:
    policy = ViewPolicy.from_config(ViewsConfig(image_size=32))
    crop = data.astronaut()[:32, :32]
    one = np.zeros(1, np.int64)
    draws = policy.draw(3, one, one, one + 32, one + 32)
    masks = MaskSampler.from_config(MasksConfig(), (4, 4)).draw(0, one, one)
    axes = views_sheet(crop[None], draws, masks, policy, (4, 4)).axes
    source, target = policy.views(crop, draws, 0)
    shown = [np.asarray(column.images[0].get_array()) for column in axes[:4]]
    predicted = predicted_patches(masks.target_idx[0], (4, 4)).repeat(8, 0).repeat(8, 1)
    assert np.array_equal(shown[0], crop)
    assert np.array_equal(shown[1], source)
    assert np.array_equal(shown[2][~predicted], source[~predicted])
    assert (shown[2][predicted] == shown[2][predicted][0]).all()  # covered: nothing of the source is seen
    assert np.array_equal(shown[3][predicted], target[predicted])


def test_predicted_patches_count_row_by_row() -> None:
    patches = predicted_patches(np.array([1, 3], np.int16), (2, 3))
    assert patches.tolist() == [[False, True, False], [True, False, False]]


def test_the_outline_of_one_patch_is_its_four_sides() -> None:
    sides = {((1, 1), (2, 1)), ((1, 2), (2, 2)), ((1, 1), (1, 2)), ((2, 1), (2, 2))}
    assert set(outline(predicted_patches(np.array([4]), (3, 3)))) == sides
    assert len(outline(np.ones((2, 3), bool))) == 10  # around the whole grid
    assert outline(np.zeros((2, 3), bool)) == []
