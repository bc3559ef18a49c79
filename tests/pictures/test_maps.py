import numpy as np
import pytest
from skimage import data
from sklearn.decomposition import PCA

from iwm_ray.config import Config, EncoderConfig, PredictorConfig, ViewsConfig
from iwm_ray.model.iwm import build_model
from iwm_ray.pictures.maps import common_colours, measure_maps, token_maps
from iwm_ray.views.policy import ViewPolicy


def measured(size, num_images=2, **views):
    config = Config(
        recipe="test",
        views=ViewsConfig(image_size=size, **views),
        encoder=EncoderConfig(name="vit_tiny_patch16_224", patch_size=8, width=16, depth=1, num_heads=2),
        predictor=PredictorConfig(depth=1, width=16, num_heads=2),
    )
    policy = ViewPolicy.from_config(config.views)
    images = np.stack([data.astronaut()[y : y + size, 200 : 200 + size] for y in range(num_images)])
    model = build_model(config, policy.action_dim)
    return measure_maps(model, images, policy), policy


@pytest.mark.parametrize(("size", "coarse"), [(32, True), (64, False)])
def test_three_panels_for_each_image_and_action(size, coarse, legible):
    maps, policy = measured(size, hue=0.2)
    assert maps.encoded.shape == maps.imagined.shape == (2, 3, size // 8, size // 8, 3)
    figure = token_maps(maps, policy)
    assert len(figure.axes) == 2 * 3 * 3
    texts = legible(figure)
    assert {"null action", "brightness −0.30", "hue +0.15 turns"} <= set(texts)
    said = next(text for text in texts if "principal components" in text)
    assert f"grid of {size // 8} x {size // 8} patches" in said
    assert f"{maps.explained.max():.0%}" in said
    assert ("no outlines" in said) == coarse
    assert sum(text.startswith("cosine") for text in texts) == 2 * 3


def test_the_first_view_is_the_clean_image_and_the_others_are_not():
    maps, _ = measured(32)
    assert np.array_equal(maps.views[0, 0], data.astronaut()[:32, 200:232])
    assert (maps.views[0, 1].mean(), maps.views[0, 1].max()) < (
        maps.views[0, 0].mean(),
        maps.views[0, 0].max(),
    )
    assert not maps.actions[0].any() and (maps.actions[1:] != 0).sum(1).tolist() == [1, 1]


def test_without_jitter_only_the_null_action_is_shown(legible):
    maps, policy = measured(32, 1, brightness=0, contrast=0, saturation=0, hue=0)
    figure = token_maps(maps, policy)
    assert len(figure.axes) == 3
    legible(figure)


def test_the_colours_are_the_principal_components():
    noise = np.random.default_rng(0)
    encoded = (noise.normal(size=(2, 30, 8)) * np.arange(1, 9)).astype(np.float32)
    colours, same, explained = common_colours(encoded, encoded)
    pca = PCA(3).fit(encoded.reshape(-1, 8))
    assert explained == pytest.approx(pca.explained_variance_ratio_.sum(), rel=1e-4)
    assert np.array_equal(colours, same)
    scores = pca.transform(encoded.reshape(-1, 8))
    for place in range(3):
        correlation = np.corrcoef(scores[:, place], colours.reshape(-1, 3)[:, place])[0, 1]
        assert abs(correlation) > 0.98  # cut off at both ends
    assert (colours.min(), colours.max()) == (0, 1)


def test_imagined_tokens_are_coloured_by_the_encoders_scale():
    """The control: were each set scaled alone, a shrunken prediction would look like a perfect one."""
    noise = np.random.default_rng(1)
    encoded = noise.normal(size=(1, 40, 6)).astype(np.float32)
    mean = encoded.mean(1, keepdims=True)
    colours, shrunken, _ = common_colours(encoded, mean + 0.2 * (encoded - mean))
    assert np.ptp(shrunken, axis=(0, 1)).max() < 0.5 < np.ptp(colours, axis=(0, 1)).min()


def test_tokens_that_are_all_alike_have_a_colour_too():
    colours, _, explained = common_colours(np.ones((1, 16, 8), np.float32), np.ones((1, 16, 8), np.float32))
    assert np.isfinite(colours).all() and explained == 0
