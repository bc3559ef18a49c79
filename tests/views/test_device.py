import cv2
import numpy as np
import pytest
import torch

from iwm_ray.config import ViewsConfig
from iwm_ray.views import device
from iwm_ray.views.device import device_views
from iwm_ray.views.draws import Draws
from iwm_ray.views.policy import ViewPolicy

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])]


def blocks(policy: ViewPolicy, crops: list[np.ndarray], count: int) -> tuple[np.ndarray, Draws]:
    chosen = np.stack([crops[i % len(crops)] for i in range(count)])
    sizes = np.full(count, 375), np.full(count, 500)
    return chosen, policy.draw(0, np.zeros(count, np.int64), np.arange(count), *sizes)


def host_views(policy: ViewPolicy, crops: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    pairs = [policy.views(crop, draws, i) for i, crop in enumerate(crops)]
    return np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs])


def colours() -> tuple[np.ndarray, torch.Tensor]:
    """Every ninth red, all greens and blues, as an image and as a batch of one."""
    grid = np.stack(np.meshgrid(np.r_[0:256:9, 255], np.arange(256), np.arange(256), indexing="ij"), axis=-1)
    image = grid.reshape(-1, 256, 3).astype(np.uint8)
    return image, torch.from_numpy(image).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("options", [{}, {"source_base": "target"}, {"jitter_order": "fixed", "hue": 0.5}])
def test_device_views_equal_host_views(crops, where, options):
    policy = ViewPolicy.from_config(ViewsConfig(image_size=160, **options))
    images, draws = blocks(policy, crops, 48)
    shipped = policy.unpack(policy.pack(draws))
    views = device_views(torch.from_numpy(images).to(where), shipped, policy)
    for view, expected in zip(views, host_views(policy, images, draws), strict=True):
        assert view.shape == (48, 3, 160, 160)
        assert view.dtype == torch.uint8
        assert view.device.type == where
        difference = np.abs(view.permute(0, 2, 3, 1).cpu().numpy().astype(int) - expected)
        assert (difference == 0).mean() > 0.999
        assert difference.max() <= 2


def test_identity_changes_no_bit(crops):
    policy = ViewPolicy.from_config(ViewsConfig(image_size=160))
    images = torch.from_numpy(np.stack(crops[:3]))
    for view in device_views(images, policy.identity(3), policy):
        assert torch.equal(view, images.permute(0, 3, 1, 2))


def test_rows_do_not_depend_on_each_other(crops):
    policy = ViewPolicy.from_config(ViewsConfig(image_size=160))
    images, draws = blocks(policy, crops, 12)
    whole = device_views(torch.from_numpy(images), draws, policy)
    for i in range(12):
        alone = {name: column[i : i + 1] for name, column in draws.items()}
        for view, one in zip(
            whole, device_views(torch.from_numpy(images[i : i + 1]), alone, policy), strict=True
        ):
            assert (
                view[i].int() - one[0].int()
            ).abs().max() <= 1  # blur kernels of another length round differently


def test_crops_and_an_outer_autocast_do_no_harm(crops):
    policy = ViewPolicy.from_config(ViewsConfig(image_size=160))
    images, draws = blocks(policy, crops, 12)
    tensor = torch.from_numpy(images.copy())
    plain = device_views(tensor, draws, policy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = device_views(tensor, draws, policy)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert torch.equal(tensor, torch.from_numpy(images))


def test_hsv_equals_opencvs_for_all_colours():
    image, batch = colours()
    hsv = torch.stack(device._to_hsv(batch), dim=-1)[0].numpy()
    np.testing.assert_array_equal(hsv, cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL))
    rgb = device._to_rgb(*batch.unbind(1))[0].permute(1, 2, 0).numpy()
    difference = np.abs(rgb - cv2.cvtColor(image, cv2.COLOR_HSV2RGB_FULL).astype(int))
    assert difference.max() <= 1
    assert difference.mean() < 1e-4


def test_luma_equals_opencvs_for_all_colours():
    image, batch = colours()
    np.testing.assert_array_equal(device._luma(batch)[0, 0].numpy(), cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


def test_a_blur_wider_than_the_image_equals_the_hosts():
    policy = ViewPolicy.from_config(
        ViewsConfig(image_size=16, blur_probability=1.0, blur_radius=(10.0, 20.0))
    )
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    _, draws = blocks(policy, list(images), 4)
    source, _ = device_views(torch.from_numpy(images), draws, policy)
    expected, _ = host_views(policy, images, draws)
    assert np.abs(source.permute(0, 2, 3, 1).numpy().astype(int) - expected).max() <= 1
