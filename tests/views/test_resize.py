import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from iwm_ray.views.resize import _triangles, cykooz_resizer, resize, resize_in_numpy

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
    pixels = noise(height, width).astype(np.int64)
    for axis, length in enumerate((height, width)):
        if length == size:
            continue
        first, weights, one = _triangles(length, size)
        matrix = np.zeros((size, length), np.int64)
        for row, tap in zip(*weights.nonzero(), strict=True):
            matrix[row, first[row] + tap] = weights[row, tap]
        assert np.abs(matrix.sum(axis=1) - one).max() <= weights.shape[1]
        sums = np.moveaxis(np.tensordot(matrix, pixels, (1, axis)), 0, axis)
        pixels = np.clip((sums + one // 2) // one, 0, 255)
    np.testing.assert_array_equal(resize_in_numpy(noise(height, width), size), pixels.astype(np.uint8))


@settings(max_examples=60, deadline=None)
@given(sides, sides, sides, st.booleans())
def test_both_makers_give_the_same_bits(height, width, size, extreme):
    image = noise(height, width)
    image = np.uint8(255) * (image > 127) if extreme else image
    np.testing.assert_array_equal(resize_in_numpy(image, size), resize(image, size))


def test_both_makers_give_the_same_bits_at_the_sizes_of_photographs(photographs):
    for photo in photographs[:4]:
        for size in (96, 224, 500):
            np.testing.assert_array_equal(resize_in_numpy(photo, size), resize(photo, size))


@pytest.mark.skipif(cykooz_resizer is None, reason="no cykooz_resizer on this machine")
def test_instruction_sets_give_the_same_bits():
    image = noise(331, 277)
    options = cykooz_resizer.ResizeOptions(
        cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.bilinear)
    )
    for instructions in cykooz_resizer.CpuExtensions:
        resizer = cykooz_resizer.Resizer()
        resizer.cpu_extensions = instructions
        source = cykooz_resizer.ImageData(277, 331, cykooz_resizer.PixelType.U8x3, image.tobytes())
        target = cykooz_resizer.ImageData(224, 224, cykooz_resizer.PixelType.U8x3)
        resizer.resize(source, target, options)
        assert target.get_buffer() == resize(image, 224).tobytes()


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
