import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from iwm_ray.views.resize import _triangles, resize

sides = st.integers(1, 90)


def pillow(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)).astype(int)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [32, 96, 150, 224, 600])
def test_photographs_stay_within_one_level_of_pillow_and_torch(photographs, size):
    for photo in photographs[:8]:
        resized = resize(photo, size).astype(int)
        tensor = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None]
        antialiased = (
            F.interpolate(tensor, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
        )
        for reference in (pillow(photo, size), antialiased):
            difference = np.abs(resized - reference)
            assert difference.max() <= 2
            assert difference.mean() < 0.25


@settings(max_examples=40, deadline=None)
@given(sides, sides, sides)
def test_any_size_equals_the_dense_product_in_whole_numbers(height, width, size):
    image = noise(height, width)
    dense = []
    for length in (height, width):
        first, weights = _triangles(length, size)
        matrix = np.zeros((size, length), np.int64)
        for row, tap in zip(*weights.nonzero(), strict=True):
            matrix[row, first[row] + tap] = weights[row, tap] * 256
        assert (matrix.sum(axis=1) == 256).all()
        dense.append(matrix)
    exact = np.einsum("rh,hwc,sw->rsc", dense[0], image.astype(np.int64), dense[1], optimize=True)
    np.testing.assert_array_equal(resize(image, size), np.rint(exact / 256**2).astype(np.uint8))


@settings(max_examples=40, deadline=None)
@given(sides, sides, sides)
def test_noise_of_any_size_stays_close_to_pillow(height, width, size):
    difference = np.abs(resize(noise(height, width), size) - pillow(noise(height, width), size))
    assert difference.max() <= 4
    assert difference.mean() < (0.5 if max(height, width) <= 8 * size else 1.5)  # few, heavily rounded pixels


def test_same_size_changes_nothing():
    np.testing.assert_array_equal(resize(noise(40, 40), 40), noise(40, 40))


def test_a_strided_view_is_read_as_its_copy_is():
    view = noise(90, 80)[11:70, 3:77]
    np.testing.assert_array_equal(resize(view, 33), resize(view.copy(), 33))


@settings(max_examples=20, deadline=None)
@given(sides, sides, sides, st.integers(0, 255))
def test_a_constant_image_stays_constant(height, width, size, value):
    assert (resize(np.full((height, width, 3), value, np.uint8), size) == value).all()
