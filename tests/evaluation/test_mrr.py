from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from iwm_ray.config import Config, EncoderConfig, PredictorConfig, ViewsConfig
from iwm_ray.errors import UsageError
from iwm_ray.evaluation.banks import alone, bank_draws, bank_views, clean_actions
from iwm_ray.evaluation.mrr import measure_mrr, rank_images, rank_rows, summarise
from iwm_ray.evaluation.ranking import chance_mrr, pooled_distances, token_distances
from iwm_ray.model.iwm import IWM, build_model
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
    """Knows for each action, and for its way back, what it leads to; any other action gets `otherwise`."""
    draws = bank_draws(POLICY, np.arange(len(images)), num_views, seed)
    known = {}
    for row, action in enumerate(clean_actions(POLICY, draws)):
        image = images[row // num_views]
        for key, view in ((action, POLICY.views(image, draws, row)[1]), (0 - action, image)):
            known[key.tobytes()] = _pixels(torch.tensor(view)[None].permute(0, 3, 1, 2))[0]
    return _PixelWorld(
        lambda action: torch.stack([known.get(row.numpy().tobytes(), otherwise) for row in action])
    )


def test_an_oracle_reaches_one_and_its_controls_fall_to_chance() -> None:
    images, num_views = _images(3), 32
    clean = _pixels(torch.tensor(images[:1]).permute(0, 3, 1, 2))[0]
    world = _oracle(images, 7, num_views, clean)
    result = measure_mrr(world, images, POLICY, seed=7, num_views=num_views, num_targets=32, inverse=True)
    metrics, table, chance = result.metrics, result.table, chance_mrr(num_views)
    assert (table["rank"] == 1).all()
    for name in ("mrr", "adjusted", "h1", "mrr_low", "mrr_high", "mean_rank", "inverse", "inverse_low"):
        assert metrics[f"mrr/{name}"] == 1, name
    assert metrics["mrr/pooled"] > 0.95  # the mean row of pixels may mistake two views
    assert metrics["mrr/zero_action"] == pytest.approx(chance)
    assert (1 / num_views) < metrics["mrr/shuffled_action"] < chance
    assert (table["nearest"] == np.arange(num_views)).all()
    assert (table["shuffled_action_rank"] > 1).all()


def test_a_constant_predictor_is_at_chance_whatever_it_says() -> None:
    anything = torch.rand(SIZE, 3 * SIZE, generator=torch.Generator().manual_seed(0))
    world = _PixelWorld(lambda action: anything.expand(len(action), -1, -1))
    metrics = measure_mrr(world, _images(2), POLICY, seed=0, num_views=16, num_targets=16).metrics
    for prefix in ("", "pooled_"):
        for name in ("zero_action", "shuffled_action", "mrr" if not prefix else ""):
            found = metrics[f"mrr/{prefix}{name}".removesuffix("_")]
            assert found == pytest.approx(chance_mrr(16)), name
        assert metrics[f"mrr/{prefix}adjusted"] == pytest.approx(0, abs=1e-9)
        assert metrics[f"mrr/{prefix}h5"] == pytest.approx(5 / 16)
        assert metrics[f"mrr/{prefix}mean_rank"] == pytest.approx(17 / 2)


def test_a_model_that_changes_nothing_finds_the_view_it_saw_and_never_the_clean_image() -> None:
    class Still(_PixelWorld):
        def predictor(
            self, context: Tensor, context_idx: Tensor, target_idx: Tensor, action: Tensor
        ) -> Tensor:
            return context

    world, images = Still(lambda action: action), _images(2)
    table = measure_mrr(world, images, POLICY, seed=0, num_views=6, num_targets=6, inverse=True).table
    assert (table["inverse_rank"] >= 2).all()
    assert np.array_equal(table["inverse_rank"], table["inverse_zero_action_rank"])
    for number, image in enumerate(images):  # by hand: the clean image stands where the next view stood
        views = bank_views(POLICY, image, bank_draws(POLICY, np.array([number]), 6, 0)).astype(float)
        for place in range(6):
            others = [views[other] for other in range(6) if other != (place + 1) % 6]
            away = [np.square(other - views[place]).sum() for other in [image.astype(float), *others]]
            assert table["inverse_rank"][number, place] == 1 + sum(d < away[0] for d in away[1:])


def test_a_collapsed_encoder_ties_all_views_at_the_average_rank() -> None:
    class Collapsed(_PixelWorld):
        def target_tokens(self, images: Tensor) -> Tensor:
            return torch.full((len(images), SIZE, 3 * SIZE), 0.3)

    world = Collapsed(lambda action: action.sum(1)[:, None, None].expand(-1, SIZE, 3 * SIZE))
    result = measure_mrr(world, _images(2), POLICY, seed=0, num_views=20, inverse=True)
    assert (result.table["rank"] == 10.5).all()
    for name in ("mrr", "pooled", "inverse"):
        assert result.metrics[f"mrr/{name}"] == pytest.approx(1 / 10.5)


def _encode_one(model: IWM, view: NDArray[np.uint8]) -> Tensor:
    return model.target_tokens(torch.tensor(view).permute(2, 0, 1)[None]).double()


def _slow_ranks(
    model: IWM, source: NDArray, action: NDArray, bank: list[Tensor], place: int
) -> tuple[int, int]:
    """Rank of bank[place] by token distance and by pooled cosine, from one prediction."""
    with torch.no_grad():
        made = model.predict(torch.tensor(source).permute(2, 0, 1)[None], torch.tensor(action)[None]).double()
    away = [float((made - other).square().sum(2).mean()) for other in bank]
    cosine = [float(torch.cosine_similarity(made.mean(1), other.mean(1))) for other in bank]
    return 1 + sum(d < away[place] for d in away), 1 + sum(c > cosine[place] for c in cosine)


@pytest.mark.parametrize("conditioning", ["none", "feature"])
def test_agrees_with_a_slow_twin(conditioning: str) -> None:
    images, num_views, num_targets, model = _images(2), 10, 7, _model(conditioning)
    sizes = {"num_views": num_views, "num_targets": num_targets, "batch_size": 4}
    result = measure_mrr(model, images, POLICY, seed=3, by_component=True, inverse=True, **sizes)
    draws, table = result.draws, result.table
    actions = clean_actions(POLICY, draws)
    for number, image in enumerate(images):
        rows = range(number * num_views, (number + 1) * num_views)
        views = [POLICY.views(image, draws, row)[1] for row in rows]
        bank, clean = [_encode_one(model, view) for view in views], _encode_one(model, image)
        hue = alone(POLICY, draws, "hue")
        hue_bank = [_encode_one(model, POLICY.views(image, hue, row)[1]) for row in rows]
        for place in range(num_targets):
            found = {name: table[name][number, place] for name in table if name.endswith("rank")}
            action, other = (actions[rows[view]] for view in (place, table["shuffled"][number, place]))
            for name, told in (("", action), ("zero_action_", 0 * action), ("shuffled_action_", other)):
                expected = _slow_ranks(model, image, told, bank, place)
                assert (found[f"{name}rank"], found[f"pooled_{name}rank"]) == expected
                following = (place + 1) % num_views
                candidates = [clean if view == following else bank[view] for view in range(num_views)]
                back = _slow_ranks(model, views[place], -told, candidates, following)
                assert found[f"inverse_{name}rank"] == back[0]
            hue_action = clean_actions(POLICY, hue)[rows[place]]
            assert found["hue_rank"] == _slow_ranks(model, image, hue_action, hue_bank, place)[0]


def test_an_untrained_model_is_near_chance() -> None:
    metrics = measure_mrr(_model(), _images(12), POLICY, seed=0, num_views=64, num_targets=64).metrics
    assert metrics["mrr/mrr"] == pytest.approx(chance_mrr(64), abs=0.02)
    assert metrics["mrr/mrr_low"] <= metrics["mrr/mrr"] <= metrics["mrr/mrr_high"]


def test_however_the_images_are_shared_out_the_joined_tables_are_the_same() -> None:
    model, images, numbers = _model(), _images(5), np.array([11, 3, 8, 0, 7])
    sizes = {"seed": 1, "num_views": 9, "num_targets": 5, "by_component": True, "inverse": True}
    whole = rank_images(model, POLICY, images, numbers, **sizes)
    calls = [
        rank_images(model, POLICY, images[part], numbers[part], **sizes) for part in ([0, 1, 2], [3], [4])
    ]
    joined = {name: np.concatenate([part[name] for part in calls]) for name in whole}
    assert all(np.array_equal(whole[name], joined[name]) for name in whole)
    assert summarise(whole, 0) == summarise(joined, 0)


def test_the_first_targets_are_the_same_however_many_there_are() -> None:
    model, images = _model(), _images(2)
    few, all_of_them = (
        measure_mrr(model, images, POLICY, seed=1, num_views=9, num_targets=num_targets).table
        for num_targets in (3, 100)
    )
    assert all_of_them["rank"].shape == (2, 9)
    for name in ("rank", "pooled_rank", "zero_action_rank", "nearest"):
        assert np.array_equal(few[name], all_of_them[name][:, :3]), name


def test_every_figure_but_chance_has_an_interval() -> None:
    metrics = measure_mrr(_model(), _images(4), POLICY, seed=0, num_views=8, by_component=True).metrics
    names = [name for name in metrics if not name.endswith(("_low", "_high", "chance"))]
    assert len(metrics) == 1 + 3 * len(names)
    for name in names:
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]


def test_rows_say_what_made_each_view(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images, numbers = _images(2), np.array([5, 2])
    sizes = {"seed": 4, "num_views": 8, "num_targets": 3}
    table = rank_images(_model(), POLICY, images, numbers, inverse=True, **sizes)
    rows = rank_rows(table, POLICY, 4)
    assert rows["image"].tolist() == [5, 5, 5, 2, 2, 2]
    assert rows["view"].tolist() == [0, 1, 2, 0, 1, 2]
    draws = bank_draws(POLICY, numbers, 8, 4)
    assert np.array_equal(rows["hue"], draws["target_hue"][[0, 1, 2, 8, 9, 10]])
    assert rows["order"][4] == "".join(map(str, draws["target_order"][9]))
    assert np.array_equal(rows["inverse_rank"].reshape(2, 3), table["inverse_rank"])
    pq.write_table(pa.table(rows), tmp_path / "ranks.parquet")
    assert pq.read_table(tmp_path / "ranks.parquet").num_rows == 6


def test_batches_do_not_change_the_ranks() -> None:
    model, images = _model(), _images(2)
    whole = measure_mrr(model, images, POLICY, seed=1, num_views=12, batch_size=100)
    parts = measure_mrr(model, images, POLICY, seed=1, num_views=12, batch_size=5)
    assert (whole.table["rank"] == parts.table["rank"]).all()
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


def test_distances_keep_their_digits_under_autocast() -> None:
    tokens = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    expected = token_distances(tokens, tokens.flip(0)), pooled_distances(tokens, tokens.flip(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_distances(tokens, tokens.flip(0)), expected[0])
        assert torch.equal(pooled_distances(tokens, tokens.flip(0)), expected[1])
        result = measure_mrr(_model(), _images(1), POLICY, seed=0, num_views=4)
    assert np.isfinite(list(result.metrics.values())).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same_ranks() -> None:
    model, images = _model(), _images(3)
    host = measure_mrr(model, images, POLICY, seed=0, num_views=32)
    device = measure_mrr(model.cuda(), images, POLICY, seed=0, num_views=32)
    assert device.metrics["mrr/mrr"] == pytest.approx(host.metrics["mrr/mrr"], abs=0.02)
