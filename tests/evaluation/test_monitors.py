from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from iwm_ray.batch import Batch
from iwm_ray.config import Config, EncoderConfig, PredictorConfig, ViewsConfig
from iwm_ray.evaluation.features import measuring, target_features
from iwm_ray.evaluation.knn import knn_accuracy
from iwm_ray.evaluation.monitors import Monitor
from iwm_ray.evaluation.rank import feature_std, lidar, rankme
from iwm_ray.evaluation.shuffle import derangement
from iwm_ray.model.iwm import IWM, build_model

SIZE, ACTION_DIM = 16, 3
STILL = {f"{name}_probability": 0.0 for name in ("jitter", "grayscale", "blur", "solarize")}


def _model(**predictor: str) -> IWM:
    config = Config(
        recipe="test",
        views=ViewsConfig(image_size=SIZE, **STILL),
        encoder=EncoderConfig(name="vit_tiny_patch16_224", patch_size=4, width=16, depth=1, num_heads=2),
        predictor=PredictorConfig(depth=1, width=16, num_heads=2, **predictor),
    )
    return build_model(config, ACTION_DIM)


def _pictures(num: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


def _batch(num: int = 7, quarantined: tuple[int, ...] = ()) -> Batch:
    order = torch.rand(num, 16, generator=torch.Generator().manual_seed(5)).argsort(1)
    weight = torch.ones(num)
    weight[list(quarantined)] = 0
    return Batch(
        source=_pictures(num, 1),
        target=_pictures(num, 2),
        action=torch.randn(num, ACTION_DIM, generator=torch.Generator().manual_seed(3)),
        context_idx=order[:, :9].sort(1).values,
        target_idx=order[:, 9:].sort(1).values,
        weight=weight,
        counter=torch.arange(num),
    )


def _labels(num: int) -> Tensor:
    return torch.arange(num) % 3


@pytest.mark.parametrize("loss", ["squared_l2", "smooth_l1"])
def test_the_loss_is_the_training_loss_and_the_gap_that_of_shuffled_actions(loss: str) -> None:
    model, batch = _model(loss=loss), _batch()
    values = Monitor(batch, _pictures(5, 0), seed=4, batch_size=3).read(model)
    shuffled = replace(batch, action=batch.action[derangement(4, 0, len(batch))])
    with measuring(model):
        expected, other = float(model(batch).loss), float(model(shuffled).loss)
    assert values["monitor/loss"] == pytest.approx(expected, rel=1e-5)
    assert values["monitor/action_gap"] == pytest.approx(other - expected, abs=1e-6)
    assert values["monitor/action_gap"] != 0


def test_without_conditioning_the_gap_is_zero() -> None:
    assert Monitor(_batch(), _pictures(5, 0)).read(_model(conditioning="none"))["monitor/action_gap"] == 0


def test_of_pixels_only_the_loss_is_read() -> None:
    model, batch = _model(target="pixels", conditioning="none"), _batch()
    values = Monitor(batch, _pictures(5, 0), batch_size=3).read(model)
    with measuring(model):
        assert values["monitor/loss"] == pytest.approx(float(model(batch).loss), rel=1e-5)
        features = target_features(model, _pictures(5, 0), 64)
    assert values["monitor/rankme"] == pytest.approx(float(rankme(features)), rel=1e-4)
    assert not {"monitor/action_gap", "monitor/cosine"} & set(values)


def test_perfect_predictions_have_cosine_one_and_no_loss() -> None:
    model, batch = _model(), _batch()

    def known(context: Tensor, context_idx: Tensor, target_idx: Tensor, action: Tensor) -> Tensor:
        rows = [int((batch.action == row).all(1).nonzero()) for row in action]
        tokens = model.target_tokens(batch.target[rows])
        return torch.stack([sample[idx] for sample, idx in zip(tokens, target_idx, strict=True)])

    model.predictor.forward = known  # type: ignore[method-assign]
    values = Monitor(batch, _pictures(5, 0)).read(model)
    assert values["monitor/cosine"] == pytest.approx(1, abs=1e-5)
    assert values["monitor/loss"] == pytest.approx(0, abs=1e-9)
    assert values["monitor/action_gap"] > 0.1


def test_quarantined_rows_take_no_part() -> None:
    model, whole = _model(), _batch(7, quarantined=(2, 6))
    kept = torch.tensor([0, 1, 3, 4, 5])
    part = Batch(*(getattr(whole, field.name)[kept] for field in fields(whole)))
    assert Monitor(whole, _pictures(5, 0)).read(model) == Monitor(part, _pictures(5, 0)).read(model)


def test_feature_readings_are_those_of_the_target_encoder() -> None:
    model, queries, bank = _model(), _pictures(20, 6), _pictures(30, 7)
    monitor = Monitor(_batch(), queries, _labels(20), bank, _labels(30), num_neighbors=5, batch_size=8)
    values = monitor.read(model)
    with measuring(model):
        features, others = (target_features(model, images, 64) for images in (queries, bank))
    expected = knn_accuracy(features, _labels(20), others, _labels(30), 5)
    assert values["monitor/rankme"] == pytest.approx(float(rankme(features)), rel=1e-4)
    assert values["monitor/target_std"] == pytest.approx(float(feature_std(features).mean()), rel=1e-4)
    assert values["monitor/knn_top1"] == pytest.approx(expected.top1)
    assert values["monitor/knn_chance"] == pytest.approx(expected.chance)


def test_lidar_is_that_of_the_views_and_left_out_without_them() -> None:
    model, views = _model(), _pictures(20, 8).unflatten(0, (5, 4))
    values = Monitor(_batch(), _pictures(5, 0), lidar_views=views, batch_size=8).read(model)
    with measuring(model):
        features = target_features(model, views.flatten(0, 1), 64).unflatten(0, (5, 4))
    assert values["monitor/lidar"] == pytest.approx(float(lidar(features)), rel=1e-3)
    assert "monitor/lidar" not in Monitor(_batch(), _pictures(5, 0)).read(model)


def test_unlabelled_images_take_no_part_in_the_knn_and_without_labels_there_is_none() -> None:
    model, queries, bank = _model(), _pictures(8, 6), _pictures(9, 7)
    none = torch.full((8,), -1)
    assert "monitor/knn_top1" not in Monitor(_batch(), queries, none, bank, _labels(9)).read(model)
    assert "monitor/knn_top1" not in Monitor(_batch(), queries).read(model)
    mixed, bank_mixed = _labels(8), _labels(9)
    mixed[:3], bank_mixed[4:] = -1, -1
    found = Monitor(_batch(), queries, mixed, bank, bank_mixed).read(model)
    clean = Monitor(_batch(), queries[3:], mixed[3:], bank[:4], bank_mixed[:4]).read(model)
    assert found["monitor/knn_top1"] == clean["monitor/knn_top1"]


def test_a_reading_repeats_itself_and_leaves_the_model_alone() -> None:
    model, monitor = _model(), Monitor(_batch(), _pictures(5, 0), _labels(5), _pictures(6, 1), _labels(6))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    assert monitor.read(model) == monitor.read(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_collapsed_encoder_shows() -> None:
    model = _model()
    with torch.no_grad():
        model.target_encoder.vit.patch_embed.proj.weight.zero_()
    values = Monitor(_batch(), _pictures(12, 0)).read(model)
    assert values["monitor/rankme"] == pytest.approx(1, abs=0.01)
    assert values["monitor/target_std"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_a_derangement_moves_every_row(count: int) -> None:
    shuffled = derangement(0, 1, count)
    assert sorted(shuffled) == list(range(count))
    assert (shuffled != np.arange(count)).all()
    if count > 3:
        assert (shuffled != derangement(0, 2, count)).any()


def test_training_flags_return_after_an_error() -> None:
    model = _model().train()
    model.target_encoder.eval()

    def fail() -> None:
        with measuring(model):
            assert not model.training
            assert not torch.is_grad_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.training
    assert not model.target_encoder.training
    assert torch.is_grad_enabled()
