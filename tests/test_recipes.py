import re

import pytest
import torch

from iwm_ray.config import Config
from iwm_ray.model.iwm import build_model
from iwm_ray.recipes import RECIPES
from iwm_ray.views.masks import MaskSampler
from iwm_ray.views.policy import ViewPolicy

# Million trained parameters of encoder and predictor, METHOD section 3; the conditioning's layers come on top.
PARAMETERS = {
    "vitb16_in1k_invariant": (85.6, 21.9),
    "vitb16_in1k_equivariant": (85.6, 32.5),
    "ijepa_vitb16_in1k": (85.6, 21.9),
    "mae_vitb16_in1k": (85.6, 26.0),  # MAE's code: decoder 8 x 512, 25.2 + 0.4 in, 0.4 out
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_fits_together(name):
    config = RECIPES[name]()
    policy = ViewPolicy.from_config(config.views)
    masks = MaskSampler.from_config(config.masks, config.grid)
    with torch.device("meta"):
        model = build_model(config, policy.action_dim)
    rows, columns = config.grid
    assert masks.num_context_tokens + masks.num_target_tokens == rows * columns
    conditioning = sum(p.numel() for p in model.predictor.conditioning.parameters())
    encoder, predictor = (
        sum(p.numel() for p in part.parameters() if p.requires_grad)
        for part in (model.encoder, model.predictor)
    )
    sizes = (encoder / 1e6, (predictor - conditioning) / 1e6)
    if name in PARAMETERS:
        assert sizes == pytest.approx(PARAMETERS[name], rel=0.005)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_states_command_cost_and_expectation(name):
    text = RECIPES[name].__doc__
    assert RECIPES[name]().recipe == name
    for word in ("Command: python -m iwm_ray.pretrain", "Cost:", "Expected"):
        assert word in text
    command = re.search(r"python -m iwm_ray.pretrain ?(\w*)", text).group(1)
    assert command in (name, "")


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith(("ijepa", "mae"))])
def test_the_baselines_have_no_photometric_action(name):
    config = RECIPES[name]()
    assert config.predictor.conditioning == "none"
    views = config.views
    assert not any(
        (
            views.jitter_probability,
            views.grayscale_probability,
            views.blur_probability,
            views.solarize_probability,
        )
    )
    is_mae = name.startswith("mae")
    assert config.predictor.loss == ("squared_l2" if is_mae else "smooth_l1")
    assert config.predictor.target == ("pixels" if is_mae else "encoder")
    masks = MaskSampler.from_config(config.masks, config.grid)
    if is_mae:
        assert masks.num_target_tokens == 3 * masks.num_context_tokens


def test_the_small_baselines_differ_from_cifar10_small_in_the_method_alone():
    names = ("cifar10_small", "ijepa_cifar10_small", "mae_cifar10_small")
    configs = [RECIPES[name]() for name in names]
    for part in ("encoder", "optimizer", "schedule", "data"):
        assert len({getattr(config, part) for config in configs}) == 1
    shapes = {
        (config.predictor.depth, config.predictor.width, config.predictor.num_heads) for config in configs
    }
    assert len(shapes) == 1
    assert all(Config.model_validate(config.model_dump()) == config for config in configs)
