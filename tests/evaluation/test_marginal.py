import numpy as np
import pytest
import torch

from iwm_ray.config import Config, EncoderConfig, PredictorConfig, ViewsConfig
from iwm_ray.evaluation.banks import bank_draws, clean_actions
from iwm_ray.evaluation.features import measuring
from iwm_ray.evaluation.marginal import marginal_features
from iwm_ray.model.iwm import IWM, build_model
from iwm_ray.views.policy import ViewPolicy

VIEWS = ViewsConfig(image_size=16)
POLICY = ViewPolicy.from_config(VIEWS)
IMAGES = torch.randint(256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def _model(conditioning: str) -> IWM:
    config = Config(
        recipe="test",
        views=VIEWS,
        encoder=EncoderConfig(name="vit_tiny_patch16_224", patch_size=8, width=16, depth=1, num_heads=2),
        predictor=PredictorConfig(depth=1, width=16, num_heads=2, conditioning=conditioning),
    )
    model = build_model(config, POLICY.action_dim)
    with torch.no_grad():  # the encoders must not be the same
        model.target_encoder.vit.patch_embed.proj.weight.mul_(2)
    return model


@pytest.mark.parametrize("encoder", ["context", "target"])
def test_it_is_the_mean_of_the_predictions(encoder: str) -> None:
    model, numbers = _model("feature"), np.array([5, 0, 2])
    sizes = {"seed": 1, "num_actions": 7, "encoder": encoder}
    with measuring(model):
        found = marginal_features(model, POLICY, IMAGES, numbers, batch_size=3, **sizes)
        for place, number in enumerate(numbers):
            actions = clean_actions(POLICY, bank_draws(POLICY, np.array([number]), 7, 1))
            image = IMAGES[place][None]
            all_of_them = [model.predict(image, torch.tensor(action)[None], encoder) for action in actions]
            assert torch.allclose(found[place], torch.cat(all_of_them).mean((0, 1)), atol=1e-5)
        alone = marginal_features(model, POLICY, IMAGES[1:2], numbers[1:2], batch_size=3, **sizes)
    assert torch.equal(alone[0], found[1])


def test_without_conditioning_it_is_the_one_prediction() -> None:
    model = _model("none")
    with measuring(model):
        found = marginal_features(model, POLICY, IMAGES, np.arange(3), seed=0)
        expected = model.predict(IMAGES, torch.zeros(3, POLICY.action_dim), "target").mean(1)
    assert torch.allclose(found, expected, atol=1e-5)
