import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from iwm_ray.config import Config, EncoderConfig, PredictorConfig, ViewsConfig
from iwm_ray.errors import UsageError
from iwm_ray.evaluation.action_regression import PENALTIES, action_features, regress, ridge
from iwm_ray.evaluation.pairs import draw_pairs
from iwm_ray.model.iwm import IWM, build_model
from iwm_ray.views.policy import ViewPolicy

SIZE = 16
VIEWS = ViewsConfig(image_size=SIZE)
POLICY = ViewPolicy.from_config(VIEWS)
IMAGES = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)


def _model(conditioning: str = "feature") -> IWM:
    config = Config(
        recipe="test",
        views=VIEWS,
        encoder=EncoderConfig(name="vit_tiny_patch16_224", patch_size=8, width=16, depth=1, num_heads=2),
        predictor=PredictorConfig(depth=1, width=16, num_heads=2, conditioning=conditioning),
    )
    return build_model(config, POLICY.action_dim)


def _table(num_images: int = 100, seed: int = 0) -> dict[str, np.ndarray]:
    """The first component of two can be read from the target, the second from the prediction."""
    generator = np.random.default_rng(seed)
    action, source, target, prediction = generator.normal(size=(4, num_images, 4, 2))
    target[..., 0] = 3 * action[..., 0] + source[..., 1] + 5
    prediction[..., 1] = action[..., 1] + 0.5 * generator.normal(size=(num_images, 4))
    names = ("number", "action", "source", "target", "prediction")
    return dict(zip(names, (np.arange(num_images), action, source, target, prediction), strict=True))


@pytest.mark.parametrize("num_rows", [12, 60])  # fewer and more than features
def test_ridge_is_sklearns(num_rows: int) -> None:
    generator = np.random.default_rng(1)
    features, actions = generator.normal(size=(num_rows, 20)) + 3, generator.normal(size=(num_rows, 3)) - 1
    weights, intercepts = ridge(features, actions, PENALTIES)
    for place, penalty in enumerate(PENALTIES):
        expected = Ridge(alpha=penalty * features.var(0).mean() * num_rows, solver="svd").fit(
            features, actions
        )
        assert pytest.approx(expected.coef_, rel=1e-6, abs=1e-9) == weights[place].T
        assert intercepts[place] == pytest.approx(expected.intercept_, rel=1e-6, abs=1e-9)


def test_each_figure_knows_what_its_features_hold() -> None:
    metrics = regress(_table(), ("a", "b"), seed=0)
    assert metrics["action_r2/a"] == pytest.approx(1, abs=1e-6)
    assert metrics["action_r2/prediction_b"] == pytest.approx(1 / 1.25, abs=0.1)
    assert metrics["action_r2/mean"] == pytest.approx((metrics["action_r2/a"] + metrics["action_r2/b"]) / 2)
    for name in ("b", "prediction_a", "source_a", "source_b", "source_mean", "shuffled_mean"):
        assert -0.15 < metrics[f"action_r2/{name}"] < 0.1, name
    names = [name for name in metrics if not name.endswith(("_low", "_high"))]
    assert len(metrics) == 3 * len(names) == 3 * (4 * 3 + 1)
    for name in names:
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]


def test_r2_is_sklearns_on_the_images_that_were_kept_back() -> None:
    """What the fit has seen does not count: noise in the last fifth of the images alone lowers the figure to nothing."""
    table = _table()
    from iwm_ray.randomness import uniforms

    last = np.argsort(uniforms(0, 0, table["number"], "r2 split", 1)[:, 0])[80:]
    table["target"][last] = np.random.default_rng(5).normal(size=(20, 4, 2))
    assert regress(table, ("a", "b"), seed=0)["action_r2/a"] < 0
    others = np.setdiff1d(np.arange(100), last)
    table = _table()
    table["target"][others] = np.random.default_rng(5).normal(size=(80, 4, 2))
    assert regress(table, ("a", "b"), seed=0)["action_r2/a"] < 0.1


def test_the_order_of_the_images_does_not_matter() -> None:
    table = _table()
    order = np.random.default_rng(3).permutation(100)
    moved = {name: column[order] for name, column in table.items()}
    assert regress(moved, ("a", "b"), seed=2) == regress(table, ("a", "b"), seed=2)


def test_components_that_do_not_vary_are_left_out() -> None:
    table = _table()
    table["action"][..., 1] = 0
    metrics = regress(table, ("a", "b"), seed=0)
    assert not any(
        "b" in name.removeprefix("action_r2/").removesuffix("_low") for name in metrics if "shuf" not in name
    )
    assert metrics["action_r2/mean"] == metrics["action_r2/a"]
    table["action"][:] = 0
    with pytest.raises(UsageError, match=r"views\.brightness"):
        regress(table, ("a", "b"), seed=0)
    with pytest.raises(UsageError, match="10"):
        regress({name: column[:9] for name, column in _table().items()}, ("a", "b"), seed=0)


def test_features_are_those_of_the_pairs_however_the_images_are_shared_out() -> None:
    model, numbers = _model(), np.array([9, 2, 5, 0, 7])
    whole = action_features(model, POLICY, IMAGES, numbers, seed=1, num_pairs=3, batch_size=2)
    pairs = draw_pairs(POLICY, IMAGES, numbers, 1, 3)
    assert np.array_equal(whole["action"], pairs.action)
    with torch.no_grad():
        for image in range(5):
            for pair in range(3):
                source, target = pairs.source[image, pair][None], pairs.target[image, pair][None]
                expected = {
                    "source": model.target_tokens(source),
                    "target": model.target_tokens(target),
                    "prediction": model.predict(source, pairs.action[image, pair][None]),
                }
                for name, tokens in expected.items():
                    assert whole[name][image, pair] == pytest.approx(tokens.mean(1)[0].numpy(), abs=1e-5), (
                        name
                    )
    parts = [
        action_features(model, POLICY, IMAGES[p], numbers[p], seed=1, num_pairs=3, batch_size=2)
        for p in ([0, 1], [2, 3, 4])
    ]
    for name in whole:
        assert np.array_equal(whole[name], np.concatenate([part[name] for part in parts])), name


def test_the_whole_way_with_the_policys_components() -> None:
    images = np.random.default_rng(1).integers(0, 256, (20, SIZE, SIZE, 3), np.uint8)
    table = action_features(_model("none"), POLICY, images, np.arange(20), seed=0)
    metrics = regress(table, [field.name for field in POLICY.schema], seed=0)
    assert {"action_r2/hue", "action_r2/source_grayscale", "action_r2/prediction_mean"} <= set(metrics)
    assert np.isfinite(list(metrics.values())).all()


def test_transfer_asks_whether_predictions_show_the_action_as_targets_do() -> None:
    table = _table()
    table["prediction"] = table["target"].copy()  # a perfect world model
    metrics = regress(table, ("a", "b"), seed=0)
    assert metrics["action_r2/transfer_a"] == metrics["action_r2/a"]
    table["prediction"][..., 0] = -table["action"][..., 0]  # the action is there, but not as in targets
    metrics = regress(table, ("a", "b"), seed=0)
    assert metrics["action_r2/prediction_a"] == pytest.approx(1, abs=1e-6)
    assert metrics["action_r2/transfer_a"] < 0
