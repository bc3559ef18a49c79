import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as pil_functional
import torchvision.transforms.v2.functional as tensor_functional
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iwm_ray.config import ViewsConfig
from iwm_ray.views.policy import ViewPolicy

POLICY = ViewPolicy.from_config(ViewsConfig())
FROM_TARGET = ViewPolicy.from_config(ViewsConfig(source_base="target"))
NAMES = ["brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize"]


def draw(policy: ViewPolicy, count: int, height: int = 375, width: int = 500, seed: int = 0):
    sizes = np.full(count, height), np.full(count, width)
    return policy.draw(seed, np.zeros(count, np.int64), np.arange(count), *sizes)


def torchvision_views(functional, gray, crop, draws, i):
    """The chain of METHOD, steps 2 and 3, with torchvision's operations and the same parameters."""

    def jitter(image, view):
        if draws[f"{view}_jitter"][i]:
            for operation in draws[f"{view}_order"][i]:
                adjust = getattr(functional, f"adjust_{NAMES[operation]}")
                image = adjust(image, float(draws[f"{view}_{NAMES[operation]}"][i]))
        return image

    target, source = jitter(crop, "target"), jitter(crop, "source")
    if draws["source_grayscale"][i]:
        source = gray(source, 3)
    if draws["source_blur"][i]:
        source = functional.gaussian_blur(source, [13, 13], [float(draws["source_blur_radius"][i])] * 2)
    if draws["source_solarize"][i]:
        source = functional.solarize(source, 128)
    return source, target


def pil_twin(crop, draws, i):
    views = torchvision_views(pil_functional, pil_functional.to_grayscale, Image.fromarray(crop), draws, i)
    return [np.asarray(view).astype(int) for view in views]


def tensor_twin(crop, draws, i):
    tensor = torch.from_numpy(crop.copy()).permute(2, 0, 1)
    views = torchvision_views(tensor_functional, tensor_functional.rgb_to_grayscale, tensor, draws, i)
    return [view.permute(1, 2, 0).numpy().astype(int) for view in views]


@pytest.mark.parametrize("twin", [pil_twin, tensor_twin])
def test_views_of_photographs_equal_torchvisions_within_one_level_on_average(crops, twin):
    draws = draw(POLICY, 96)
    differences: tuple[list, list] = ([], [])
    for i in range(96):
        crop = crops[i % len(crops)]
        ours = POLICY.views(crop, draws, i)
        for place, (view, expected) in enumerate(zip(ours, twin(crop, draws, i), strict=True)):
            differences[place].append(np.abs(view - expected))
    source, target = np.stack(differences[0]), np.stack(differences[1])
    assert source.mean() < 0.7
    assert target.mean() < 0.7
    assert np.percentile(target, 95) <= 3
    assert target.mean(axis=(1, 2, 3)).max() < 3  # no single image is far off


def test_golden_draws():
    """Committed values: a change of these changes every run that anyone has recorded."""
    draws = POLICY.draw(
        5, np.array([0, 3]), np.array([7, 1_000_000]), np.array([375, 1200]), np.array([500, 800])
    )
    golden = {
        "image_height": [375, 1200],
        "image_width": [500, 800],
        "crop_top": [0.1706666648387909, 0.42250001430511475],
        "crop_left": [0.041999999433755875, 0.14124999940395355],
        "crop_height": [0.7226666808128357, 0.49000000953674316],
        "crop_width": [0.6679999828338623, 0.6274999976158142],
        "flip": [True, False],
        "target_jitter": [False, True],
        "target_brightness": [1.0, 0.7867723107337952],
        "target_contrast": [1.0, 1.2481505870819092],
        "target_saturation": [1.0, 0.8474256992340088],
        "target_hue": [0.0, 0.040474891662597656],
        "target_order": [[3, 0, 2, 1], [2, 1, 0, 3]],
        "source_jitter": [True, True],
        "source_brightness": [1.1827974319458008, 1.0353463888168335],
        "source_contrast": [1.371972680091858, 0.6792559027671814],
        "source_saturation": [1.0636663436889648, 0.840863823890686],
        "source_hue": [-0.07564642280340195, -0.08625981956720352],
        "source_order": [[2, 0, 1, 3], [0, 1, 2, 3]],
        "source_grayscale": [False, False],
        "source_blur": [True, False],
        "source_blur_radius": [1.8535674810409546, 0.0],
        "source_solarize": [False, False],
        "source_solarize_threshold": [128, 128],
    }
    assert draws.keys() == golden.keys()
    for name, values in golden.items():
        np.testing.assert_array_equal(draws[name], np.array(values, draws[name].dtype), err_msg=name)


def test_schema_and_action_dim():
    assert [field.name for field in POLICY.schema] == NAMES
    assert [field.scale for field in POLICY.schema] == [0.4, 0.4, 0.2, 0.1, 1, 1, 1]
    assert [field.identity for field in POLICY.schema] == [1, 1, 1, 0, 0, 0, 0]
    assert POLICY.action_dim == 7
    weak = ViewPolicy.from_config(ViewsConfig(hue=0, contrast=0, blur_probability=0))
    assert weak.action_dim == 7  # one network fits runs that differ in a strength


def test_action_is_target_minus_source_in_strengths_then_flags():
    draws = draw(POLICY, 300)
    action = POLICY.encode(draws)
    assert action.dtype == np.float32
    for place, (name, strength) in enumerate(zip(NAMES[:4], (0.4, 0.4, 0.2, 0.1), strict=True)):
        expected = (draws[f"target_{name}"] - draws[f"source_{name}"]) / strength
        np.testing.assert_allclose(action[:, place], expected, atol=2e-6)
    for place, name in enumerate(NAMES[4:], start=4):
        np.testing.assert_array_equal(action[:, place], draws[f"source_{name}"])
    assert np.abs(action[:, :4]).max() <= 2 + 1e-5


def test_action_from_the_target_view_undoes_the_sources_jitter():
    draws = draw(FROM_TARGET, 300)
    action = FROM_TARGET.encode(draws)
    np.testing.assert_allclose(action[:, 0], (1 - draws["source_brightness"]) / 0.4, atol=2e-6)
    np.testing.assert_allclose(action[:, 3], (0 - draws["source_hue"]) / 0.1, atol=2e-6)
    unjittered = ~draws["source_jitter"]
    assert unjittered.any()
    np.testing.assert_array_equal(action[unjittered, :4], np.zeros((unjittered.sum(), 4)))


@pytest.mark.parametrize("policy", [POLICY, FROM_TARGET])
def test_identity_makes_equal_views_and_the_null_action(policy, crops):
    draws = policy.identity(2)
    source, target = policy.views(crops[0], draws, 1)
    assert source is target is crops[0]
    action = policy.encode(draws)
    np.testing.assert_array_equal(action, np.zeros((2, 7), np.float32))
    assert not np.signbit(action).any()


def test_equal_jitters_give_the_null_action():
    draws = draw(POLICY, 100)
    for name in ("jitter", "brightness", "contrast", "saturation", "hue", "order"):
        draws[f"source_{name}"] = draws[f"target_{name}"]
    assert not POLICY.encode(draws)[:, :4].any()


def test_source_base_target_builds_the_source_on_the_target(crops):
    draws = draw(FROM_TARGET, 30)
    i = int((draws["target_jitter"] & draws["source_jitter"]).argmax())
    source, target = FROM_TARGET.views(crops[0], draws, i)
    np.testing.assert_array_equal(target, POLICY.views(crops[0], draws, i)[1])
    np.testing.assert_array_equal(source, POLICY.views(target, draws, i)[0])


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 99), st.integers(8, 900), st.integers(8, 900)),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 3),
)
def test_a_row_depends_on_its_own_arguments_only(rows, seed):
    block = POLICY.draw(seed, *np.array(rows, np.int64).T)
    for i, row in enumerate(rows):
        alone = POLICY.draw(seed, *np.array([row], np.int64).T)
        for name, column in block.items():
            np.testing.assert_array_equal(column[i], alone[name][0], err_msg=name)


def test_seed_epoch_and_sample_change_the_draws():
    zero, one = np.array([0]), np.array([1])
    size = np.array([300]), np.array([400])
    base = POLICY.draw(0, zero, zero, *size)["crop_top"]
    for other in (
        POLICY.draw(1, zero, zero, *size),
        POLICY.draw(0, one, zero, *size),
        POLICY.draw(0, zero, one, *size),
    ):
        assert other["crop_top"] != base


def test_pack_ships_what_the_device_needs_value_for_value():
    draws = draw(POLICY, 50)
    packed = POLICY.pack(draws)
    assert packed.dtype == np.float32
    unpacked = POLICY.unpack(packed)
    assert {name for name in draws if name.startswith(("source_", "target_"))} == unpacked.keys()
    for name, column in unpacked.items():
        assert column.dtype == draws[name].dtype
        np.testing.assert_array_equal(column, draws[name])


def test_crop_is_flipped_where_drawn(photographs):
    draws = draw(POLICY, 20, *photographs[0].shape[:2])
    flipped = int(draws["flip"].argmax())
    straight = draws | {"flip": np.zeros(20, bool)}
    crop = POLICY.crop(photographs[0], draws, flipped)
    assert crop.shape == (224, 224, 3)
    np.testing.assert_array_equal(crop, POLICY.crop(photographs[0], straight, flipped)[:, ::-1])


def test_data_tasks_import_the_views_without_torch():
    code = "import sys, iwm_ray.views.policy, iwm_ray.views.masks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
