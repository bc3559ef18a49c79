import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as pil_functional
import torchvision.transforms.v2.functional as tensor_functional
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop as TorchvisionCrop

from iwm_ray.views import transforms
from iwm_ray.views.draws import Keys
from iwm_ray.views.transforms import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    RandomResizedCrop,
    Solarize,
)

JITTER = ColorJitter("target", 0.8, 0.4, 0.4, 0.2, 0.1, "random")
CROP = RandomResizedCrop(32, (0.3, 1.0), (3 / 4, 4 / 3))
PHOTOMETRIC = [
    JITTER,
    ColorJitter("source", 0.8, 0.4, 0.4, 0.2, 0.1, "random"),
    Grayscale(0.2),
    GaussianBlur(0.2, (0.1, 2.0)),
    Solarize(0.2, 128),
]


def keys(count: int, seed: int = 0) -> Keys:
    return Keys(seed, np.zeros(count, np.int64), np.arange(count))


def as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def of_pil(operation):
    return lambda image, *values: np.asarray(operation(Image.fromarray(image), *values)).astype(int)


def of_tensor(operation):
    return lambda image, *values: operation(as_tensor(image), *values).permute(1, 2, 0).numpy().astype(int)


def three_gray(functional, name):
    return lambda image: getattr(functional, name)(image, 3)


def wide_blur(image, radius):
    return tensor_functional.gaussian_blur(image, [23, 23], [radius, radius])


FACTORS = (0.0, 0.21, 0.6, 0.997, 1.0, 1.13, 1.4, 2.0)
# operation, its values, torchvision on PIL images, torchvision on uint8 tensors, and for each of the two the mean and the
# largest difference allowed. Hue: Pillow's own 8-bit HSV is further from the exact rotation than ours.
TWINS = [
    (transforms.adjust_brightness, FACTORS, "adjust_brightness", (0.001, 1), (0.001, 1)),
    (transforms.adjust_contrast, FACTORS, "adjust_contrast", (0.05, 1), (0.4, 1)),
    (transforms.adjust_saturation, FACTORS, "adjust_saturation", (0.01, 1), (0.6, 2)),
    (transforms.shift_hue, (-0.5, -0.1, -0.013, 0.0, 0.002, 0.07, 0.5), "adjust_hue", (0.7, 12), (0.35, 6)),
    (transforms.solarize, (0, 1, 128, 255), "solarize", (0, 0), (0, 0)),
]


@pytest.mark.parametrize(
    ("ours", "values", "name", "pil_limit", "tensor_limit"), TWINS, ids=lambda x: str(x)[:20]
)
def test_each_operation_equals_torchvision(crops, ours, values, name, pil_limit, tensor_limit):
    twins = [
        (of_pil(getattr(pil_functional, name)), *pil_limit),
        (of_tensor(getattr(tensor_functional, name)), *tensor_limit),
    ]
    for twin, mean, largest in twins:
        difference = [np.abs(ours(crop, value) - twin(crop, value)) for crop in crops[:8] for value in values]
        assert np.mean(difference) <= mean
        assert np.max(difference) <= largest


def test_gray_equals_torchvision(crops):
    for functional, wrap, name, mean in (
        (pil_functional, of_pil, "to_grayscale", 0.01),
        (tensor_functional, of_tensor, "rgb_to_grayscale", 0.6),  # cuts off where Pillow and we round
    ):
        twin = wrap(three_gray(functional, name))
        difference = [np.abs(transforms.to_gray(crop) - twin(crop)) for crop in crops[:8]]
        assert np.mean(difference) <= mean
        assert np.max(difference) <= 1


@pytest.mark.parametrize("radius", [0.1, 0.4, 1.0, 1.7, 2.0])
def test_blur_equals_torchvision(crops, radius):
    difference = [
        np.abs(transforms.gaussian_blur(crop, radius) - of_tensor(wide_blur)(crop, radius))
        for crop in crops[:4]
    ]
    assert np.mean(difference) < 0.05
    assert np.max(difference) <= 1


def test_a_blur_wider_than_the_image_is_cut():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert transforms.gaussian_blur(image, 60.0).std() < 0.3 * image.std()


@pytest.mark.parametrize("transform", PHOTOMETRIC, ids=lambda t: type(t).__name__)
class TestPhotometric:
    """What all members of the family promise."""

    def test_identity_changes_no_bit_and_is_coded_as_zero(self, transform, crops):
        draws = transform.identity(1)
        assert transform.apply(crops[0], draws, 0) is crops[0]
        np.testing.assert_array_equal(
            transform.encode(draws), np.zeros((1, len(transform.fields)), np.float32)
        )

    def test_rows_are_pure(self, transform):
        block = transform.sample(keys(50))
        for row in (0, 17, 49):
            alone = transform.sample(Keys(0, np.zeros(1, np.int64), np.array([row])))
            assert block.keys() == alone.keys()
            for name, column in alone.items():
                np.testing.assert_array_equal(block[name][row], column[0])
                assert block[name].dtype == column.dtype

    def test_sample_has_the_columns_and_types_of_identity(self, transform):
        drawn, identity = transform.sample(keys(3)), transform.identity(3)
        assert {n: (c.dtype, c.shape) for n, c in drawn.items()} == {
            n: (c.dtype, c.shape) for n, c in identity.items()
        }

    def test_apply_leaves_its_input_alone(self, transform, crops):
        before, draws = crops[0].copy(), transform.sample(keys(40))
        for row in range(40):
            changed = transform.apply(crops[0], draws, row)
            assert changed.shape == before.shape
            assert changed.dtype == np.uint8
        np.testing.assert_array_equal(crops[0], before)

    def test_code_is_finite_and_within_one(self, transform):
        code = transform.encode(transform.sample(keys(500)))
        assert code.dtype == np.float32
        assert code.shape == (500, len(transform.fields))
        assert np.abs(code).max() <= 1 + 1e-6

    def test_applied_rows_are_coded_and_others_are_not(self, transform):
        draws = transform.sample(keys(500))
        applied = next(column for column in draws.values() if column.dtype == bool)
        np.testing.assert_array_equal(np.abs(transform.encode(draws)).max(axis=1) > 0, applied)
        assert abs(applied.mean() - transform.probability) < 0.09


def test_jitter_is_uniform_and_its_orders_are_too():
    draws = JITTER.sample(keys(4000))
    applied = draws["target_jitter"]
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        values = draws[f"target_{name}"][applied]
        counts, _ = np.histogram(values, 10, (low, high))
        assert counts.sum() == len(values)
        assert np.abs(counts / len(values) - 0.1).max() < 0.03
    orders, counts = np.unique(draws["target_order"], axis=0, return_counts=True)
    assert [tuple(order) for order in orders] == sorted(itertools.permutations(range(4)))
    assert counts.min() > 100


def test_parameters_of_one_view_are_independent_of_each_other_and_of_the_other_view():
    strong = [ColorJitter(view, 1.0, 0.4, 0.4, 0.2, 0.1, "random") for view in ("target", "source")]
    codes = np.concatenate([jitter.encode(jitter.sample(keys(4000))) for jitter in strong], axis=1)
    correlation = np.corrcoef(codes.T) - np.eye(8)
    assert np.abs(correlation).max() < 0.06


def test_fixed_order_is_brightness_contrast_saturation_hue(crops):
    draws = ColorJitter("target", 1.0, 0.4, 0.4, 0.2, 0.1, "fixed").sample(keys(5))
    expected = crops[0]
    for operation, name in zip(JITTER.OPERATIONS, JITTER.NAMES, strict=True):
        expected = operation(expected, float(draws[f"target_{name}"][3]))
    np.testing.assert_array_equal(JITTER.apply(crops[0], draws, 3), expected)


def test_order_matters(crops):
    draws = ColorJitter("target", 1.0, 0.4, 0.4, 0.2, 0.1, "fixed").sample(keys(1))
    other = draws | {"target_order": np.array([[3, 2, 1, 0]], np.uint8)}
    assert (JITTER.apply(crops[0], draws, 0) != JITTER.apply(crops[0], other, 0)).any()


def test_a_strength_of_zero_keeps_its_component_at_zero(crops):
    jitter = ColorJitter("target", 1.0, 0.4, 0.0, 0.2, 0.0, "random")
    draws = jitter.sample(keys(100))
    assert (draws["target_contrast"] == 1).all()
    assert (draws["target_hue"] == 0).all()
    np.testing.assert_array_equal(np.abs(jitter.encode(draws)).max(axis=0) > 0, [True, False, True, False])


def test_blur_radius_is_uniform_where_applied():
    draws = GaussianBlur(0.5, (0.1, 2.0)).sample(keys(2000))
    radius = draws["source_blur_radius"]
    assert (radius[~draws["source_blur"]] == 0).all()
    counts, _ = np.histogram(radius[draws["source_blur"]], 5, (0.1, 2.0))
    assert counts.sum() == draws["source_blur"].sum()
    assert np.abs(counts / counts.sum() - 0.2).max() < 0.05


def test_flip_mirrors_half_of_the_images(crops):
    flip = HorizontalFlip(0.5)
    draws = flip.sample(keys(1000))
    assert abs(draws["flip"].mean() - 0.5) < 0.05
    row = int(draws["flip"].argmax())
    np.testing.assert_array_equal(flip.apply(crops[0], draws, row), crops[0][:, ::-1])
    assert flip.apply(crops[0], flip.identity(1), 0) is crops[0]


def slow_crop_box(uniform, scale, ratio, height, width):
    """torchvision's `RandomResizedCrop.get_params`, fed with the given uniforms."""
    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[attempt])
        low, high = np.log(ratio)
        aspect = np.exp(low + (high - low) * uniform[10 + attempt])
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(uniform[20] * (height - h + 1)), int(uniform[21] * (width - w + 1)), h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.integers(0, 10**6),
    st.sampled_from([(0.3, 1.0), (0.9, 1.0)]),
)
def test_crop_boxes_equal_torchvisions_algorithm(height, width, sample, scale):
    crop = RandomResizedCrop(32, scale, (3 / 4, 4 / 3))
    one = Keys(0, np.zeros(1, np.int64), np.array([sample]))
    draws = crop.sample(one, np.array([height]), np.array([width]))
    expected = slow_crop_box(one.uniforms("crop", 22)[0], scale, crop.ratio, height, width)
    assert crop.box(draws, 0, height, width) == expected
    top, left, box_height, box_width = expected
    assert top + box_height <= height
    assert left + box_width <= width


def test_fallback_is_torchvisions(photographs):
    """No box of the whole area and an aspect near 1 fits a panorama: both take the central square."""
    wide = torch.zeros(3, 40, 400)
    top, left, height, width = TorchvisionCrop.get_params(wide, [1.0, 1.0], [1.0, 1.0])
    crop = RandomResizedCrop(32, (1.0, 1.0), (1.0, 1.0))
    draws = crop.sample(keys(1), np.array([40]), np.array([400]))
    assert crop.box(draws, 0, 40, 400) == (top, left, height, width) == (0, 180, 40, 40)


def test_crop_areas_aspects_and_places_are_distributed_as_torchvisions():
    count, height, width = 3000, 300, 400
    draws = CROP.sample(keys(count), np.full(count, height), np.full(count, width))
    ours = np.array([CROP.box(draws, row, height, width) for row in range(count)])
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = np.array(
        [TorchvisionCrop.get_params(image, list(CROP.scale), list(CROP.ratio)) for _ in range(count)]
    )
    for column in range(4):
        for quantile in (0.1, 0.5, 0.9):
            a, b = np.quantile(ours[:, column], quantile), np.quantile(theirs[:, column], quantile)
            assert abs(a - b) < 0.04 * (height if column in (0, 2) else width)


def test_an_image_that_could_not_be_decoded_draws_without_harm():
    draws = CROP.sample(keys(2), np.array([0, 40]), np.array([0, 30]))
    assert all(np.isfinite(column).all() for column in draws.values())
    assert CROP.box(draws, 0, 1, 1) == (0, 0, 1, 1)


def test_crop_equals_torchvisions_resized_crop(photographs):
    count = len(photographs)
    sizes = np.array([photo.shape[:2] for photo in photographs])
    draws = CROP.sample(keys(count), sizes[:, 0], sizes[:, 1])
    for row, photo in enumerate(photographs):
        box = CROP.box(draws, row, *photo.shape[:2])
        expected = np.asarray(pil_functional.resized_crop(Image.fromarray(photo), *box, [32, 32])).astype(int)
        difference = np.abs(CROP.apply(photo, draws, row) - expected)
        assert difference.max() <= 1
        assert difference.mean() < 0.25


def test_identity_crop_of_a_square_image_changes_no_bit(crops):
    whole = RandomResizedCrop(160, (0.3, 1.0), (3 / 4, 4 / 3))
    np.testing.assert_array_equal(whole.apply(crops[0], whole.identity(1), 0), crops[0])
