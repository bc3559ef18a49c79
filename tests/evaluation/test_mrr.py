from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from iwm_ray.config import Config, EncoderConfig, PredictorConfig, ViewsConfig
from iwm_ray.errors import UsageError
from iwm_ray.evaluation.mrr import (
    average_ranks,
    bank_draws,
    bank_views,
    chance_mrr,
    clean_actions,
    measure_mrr,
    pooled_distances,
    token_distances,
)
from iwm_ray.model.iwm import IWM, build_model
from iwm_ray.views.device import device_views
from iwm_ray.views.policy import ViewPolicy

SIZE = 16
VIEWS = ViewsConfig(image_size=SIZE)
POLICY = ViewPolicy.from_config(VIEWS)


def _images(num: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(20, 200, (num, SIZE, SIZE, 3), np.uint8)


def _model(conditioning: str = "feature", seed: int = 0) -> IWM:
    config = Config(
        recipe="test",
        seed=seed,
        views=VIEWS,
        encoder=EncoderConfig(name="vit_tiny_patch16_224", patch_size=8, width=16, depth=1, num_heads=2),
        predictor=PredictorConfig(depth=1, width=16, num_heads=2, conditioning=conditioning),
    )
    return build_model(config, POLICY.action_dim)


def _pixels(images: Tensor) -> Tensor:
    """`[b 3 h w]` -> `[b h 3*w]`: every pixel counts."""
    return images.permute(0, 2, 1, 3).flatten(2).float() / 255


class _PixelWorld(nn.Module):
    """Target tokens are the pixels; the predictor is a function of the actions."""

    def __init__(self, predict: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.predict_from = predict

    def encoder(self, images: Tensor) -> Tensor:
        return _pixels(images)

    def target_tokens(self, images: Tensor) -> Tensor:
        return _pixels(images)

    def predictor(self, context: Tensor, context_idx: Tensor, target_idx: Tensor, action: Tensor) -> Tensor:
        assert context_idx.shape == target_idx.shape == context.shape[:2]
        return self.predict_from(action)


def _oracle(images: NDArray[np.uint8], seed: int, num_views: int, otherwise: Tensor) -> _PixelWorld:
    """Knows for each action which view it leads to, as if it could see; any other action gets `otherwise`."""
    draws = bank_draws(POLICY, len(images), num_views, seed)
    known = {}
    for row, action in enumerate(clean_actions(POLICY, draws)):
        view = POLICY.views(images[row // num_views], draws, row)[1]
        known[action.tobytes()] = _pixels(torch.tensor(view)[None].permute(0, 3, 1, 2))[0]
    return _PixelWorld(
        lambda action: torch.stack([known.get(row.numpy().tobytes(), otherwise) for row in action])
    )


def test_chance_is_the_mean_reciprocal_of_all_ranks() -> None:
    assert chance_mrr(2) == 0.75
    assert chance_mrr(256) == pytest.approx(0.0239, abs=5e-5)


def test_an_oracle_reaches_one_and_its_controls_fall_to_chance() -> None:
    images, num_views = _images(3), 32
    clean = _pixels(torch.tensor(images[:1]).permute(0, 3, 1, 2))[0]
    result = measure_mrr(_oracle(images, 7, num_views, clean), images, POLICY, seed=7, num_views=num_views)
    metrics, chance = result.metrics, chance_mrr(num_views)
    assert (result.ranks == 1).all()
    assert metrics["mrr/mrr"] == metrics["mrr/adjusted"] == metrics["mrr/h1"] == metrics["mrr/mrr_low"] == 1
    assert metrics["mrr/pooled"] > 0.95  # the mean row of pixels may mistake two views
    assert metrics["mrr/zero_action"] == pytest.approx(chance)
    assert (1 / num_views) < metrics["mrr/shuffled_action"] < chance
    assert (result.nearest == np.arange(num_views)).all()
    assert (result.shuffled_ranks > 1).all()


def test_a_constant_predictor_is_at_chance_whatever_it_says() -> None:
    anything = torch.rand(SIZE, 3 * SIZE, generator=torch.Generator().manual_seed(0))
    world = _PixelWorld(lambda action: anything.expand(len(action), -1, -1))
    metrics = measure_mrr(world, _images(2), POLICY, seed=0, num_views=16).metrics
    for name in ("mrr/mrr", "mrr/zero_action", "mrr/shuffled_action", "mrr/pooled"):
        assert metrics[name] == pytest.approx(chance_mrr(16)), name
    assert metrics["mrr/h5"] == pytest.approx(5 / 16)


def test_a_collapsed_encoder_ties_all_views_at_the_average_rank() -> None:
    class Collapsed(_PixelWorld):
        def target_tokens(self, images: Tensor) -> Tensor:
            return torch.full((len(images), SIZE, 3 * SIZE), 0.3)

    world = Collapsed(lambda action: action.sum(1)[:, None, None].expand(-1, SIZE, 3 * SIZE))
    result = measure_mrr(world, _images(2), POLICY, seed=0, num_views=20)
    assert (result.ranks == 10.5).all()
    assert result.metrics["mrr/mrr"] == pytest.approx(1 / 10.5)
    assert result.metrics["mrr/pooled"] == pytest.approx(1 / 10.5)


@pytest.mark.parametrize("conditioning", ["none", "feature"])
def test_agrees_with_a_slow_twin(conditioning: str) -> None:
    images, num_views, model = _images(2), 10, _model(conditioning)
    result = measure_mrr(model, images, POLICY, seed=3, num_views=num_views, batch_size=4)
    draws = result.draws
    for image in range(len(images)):
        rows = range(image * num_views, (image + 1) * num_views)
        clean = torch.tensor(images[image]).permute(2, 0, 1)[None]
        views = [torch.tensor(POLICY.views(images[image], draws, row)[1]) for row in rows]
        bank = [model.target_tokens(view.permute(2, 0, 1)[None]) for view in views]
        for view in range(num_views):
            action = torch.tensor(result.actions[image, view])[None]
            with torch.no_grad():
                prediction = model.predict(clean, action)
            distances = [float((prediction - other).double().square().sum(2).mean()) for other in bank]
            assert result.nearest[image, view] == int(np.argmin(distances))
            assert result.ranks[image, view] == 1 + sum(d < distances[view] for d in distances)


def test_an_untrained_model_is_near_chance() -> None:
    metrics = measure_mrr(_model(), _images(12), POLICY, seed=0, num_views=64).metrics
    assert metrics["mrr/mrr"] == pytest.approx(chance_mrr(64), abs=0.02)
    assert metrics["mrr/mrr_low"] <= metrics["mrr/mrr"] <= metrics["mrr/mrr_high"]


def test_batches_do_not_change_the_ranks() -> None:
    model, images = _model(), _images(2)
    whole = measure_mrr(model, images, POLICY, seed=1, num_views=12, batch_size=100)
    parts = measure_mrr(model, images, POLICY, seed=1, num_views=12, batch_size=5)
    assert (whole.ranks == parts.ranks).all()
    assert whole.metrics == pytest.approx(parts.metrics)


def test_the_model_and_the_global_generators_are_left_alone() -> None:
    model, images = _model(), _images(1)
    model.train()
    model.target_encoder.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    measure_mrr(model, images, POLICY, seed=1, num_views=4)
    assert model.training
    assert model.predictor.blocks[0].training
    assert not model.target_encoder.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_banks_are_keyed_by_seed_and_image_and_grow_at_the_end() -> None:
    small, large = bank_draws(POLICY, 2, 5, seed=4), bank_draws(POLICY, 3, 8, seed=4)
    assert np.array_equal(small["target_hue"][:5], large["target_hue"][:5])
    assert np.array_equal(small["target_hue"][5:], large["target_hue"][8:13])
    assert not np.array_equal(small["target_hue"], bank_draws(POLICY, 2, 5, seed=5)["target_hue"])
    assert len(np.unique(large["target_brightness"])) == 24  # no view without jitter, none twice
    assert large["target_jitter"].all()
    for column in ("flip", "source_jitter", "source_grayscale", "source_blur", "source_solarize"):
        assert not large[column].any()


def test_bank_views_are_the_policys_target_views() -> None:
    image, draws = _images(1)[0], bank_draws(POLICY, 1, 4, seed=0)
    expected = [POLICY.views(image, draws, row)[1] for row in range(4)]
    assert np.array_equal(bank_views(POLICY, image, draws), np.stack(expected))


@pytest.mark.parametrize("source_base", ["crop", "target"])
def test_actions_from_the_clean_image_are_the_jitter(source_base: str) -> None:
    policy = ViewPolicy.from_config(ViewsConfig(image_size=SIZE, source_base=source_base))
    draws = bank_draws(policy, 1, 6, seed=0)
    actions = clean_actions(policy, draws)
    assert actions[:, 0] == pytest.approx((draws["target_brightness"] - 1) / VIEWS.brightness, abs=1e-6)
    assert actions[:, 3] == pytest.approx(draws["target_hue"] / VIEWS.hue, abs=1e-6)
    assert not actions[:, 4:].any()


def test_components_are_measured_one_at_a_time_and_absent_ones_left_out() -> None:
    images = _images(1)
    policy = ViewPolicy.from_config(ViewsConfig(image_size=SIZE, hue=0))
    metrics = measure_mrr(_model(), images, policy, seed=0, num_views=6, by_component=True).metrics
    assert {"mrr/brightness", "mrr/contrast", "mrr/saturation"} <= set(metrics)
    assert "mrr/hue" not in metrics


def test_without_jitter_there_is_nothing_to_find() -> None:
    still = ViewPolicy.from_config(
        ViewsConfig(image_size=SIZE, brightness=0, contrast=0, saturation=0, hue=0)
    )
    with pytest.raises(UsageError, match=r"views\.brightness"):
        measure_mrr(_model(), _images(1), still, seed=0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), num=st.integers(2, 12), num_values=st.integers(1, 6))
def test_average_ranks_agree_with_scipy_and_move_with_the_bank(seed: int, num: int, num_values: int) -> None:
    from scipy.stats import rankdata

    generator = np.random.default_rng(seed)
    distances = generator.integers(0, num_values, (num, num)) / 10
    expected = np.array([rankdata(row)[place] for place, row in enumerate(distances)])
    assert np.array_equal(average_ranks(torch.tensor(distances)).numpy(), expected)
    order = generator.permutation(num)
    assert np.array_equal(average_ranks(torch.tensor(distances[order][:, order])).numpy(), expected[order])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), num_tokens=st.sampled_from([1, 3, 64, 65, 130]))
def test_token_distances_agree_with_the_formula(seed: int, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randn(3, num_tokens, 5, generator=generator)
    bank = torch.randn(4, num_tokens, 5, generator=generator)
    slow = (predictions[:, None].double() - bank[None].double()).square().sum(3).mean(2)
    expected = slow / bank.double().square().sum(2).mean()
    assert torch.allclose(token_distances(predictions, bank), expected, rtol=1e-12, atol=1e-12)
    means = predictions.double().mean(1)[:, None], bank.double().mean(1)[None]
    cosine = torch.nn.functional.cosine_similarity(*means, dim=2)
    assert torch.allclose(pooled_distances(predictions, bank), 1 - cosine, atol=1e-12)


def test_nearly_equal_views_are_told_apart_and_equal_ones_tie() -> None:
    """Differences of one part in a million drown in float32: 1 - 2 + 1 keeps no digit of them."""
    base = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    bank = torch.stack([base, base, base * (1 + 1e-4), base * (1 + 3e-4), base + 1])
    ranks = average_ranks(token_distances(bank, bank))
    assert ranks.tolist() == [1.5, 1.5, 1, 1, 1]
    # From a prediction at the second place, the others follow in the order of their scales.
    assert token_distances(bank[2:3], bank)[0].argsort()[0] == 2


def test_distances_keep_their_digits_under_autocast() -> None:
    tokens = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    expected = token_distances(tokens, tokens.flip(0)), pooled_distances(tokens, tokens.flip(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_distances(tokens, tokens.flip(0)), expected[0])
        assert torch.equal(pooled_distances(tokens, tokens.flip(0)), expected[1])
        result = measure_mrr(_model(), _images(1), POLICY, seed=0, num_views=4)
    assert np.isfinite(list(result.metrics.values())).all()


def test_a_seed_keeps_its_banks_for_ever() -> None:
    brightness = bank_draws(POLICY, 1, 3, seed=0)["target_brightness"]
    assert brightness == pytest.approx([0.64451045, 1.2477195, 1.0644114], abs=1e-6)


def test_the_devices_banks_are_the_hosts() -> None:
    """On a GPU the views come from views/device.py; here it runs on the CPU with the same draws."""
    image, draws = _images(1)[0], bank_draws(POLICY, 1, 20, seed=0)
    ours = bank_views(POLICY, image, draws).astype(int)
    clean = torch.tensor(image)[None].expand(20, -1, -1, -1)
    theirs = device_views(clean, draws, POLICY)[1].permute(0, 2, 3, 1).numpy().astype(int)
    assert (np.abs(ours - theirs) <= 1).mean() > 0.999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same_ranks() -> None:
    model, images = _model(), _images(3)
    host = measure_mrr(model, images, POLICY, seed=0, num_views=32)
    device = measure_mrr(model.cuda(), images, POLICY, seed=0, num_views=32)
    assert device.metrics["mrr/mrr"] == pytest.approx(host.metrics["mrr/mrr"], abs=0.02)
