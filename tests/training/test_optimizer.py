import copy

import pytest
import torch

from iwm_ray.config import OptimizerConfig
from iwm_ray.training.optimizer import (
    apply_gradients,
    expected_moments,
    is_decayed,
    make_optimizer,
    moments,
    set_moments,
    set_rates,
)


@pytest.mark.parametrize("conditioning", ["sequence", "feature", "adaln"])
def test_what_is_decayed(toy, conditioning):
    model = toy.state(toy.config(conditioning)).model
    optimizer = make_optimizer(model, OptimizerConfig())
    decayed, others = ({id(parameter) for parameter in group["params"]} for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in decayed | others
        elif name.endswith("bias") or name.endswith("mask_token") or "norm" in name:
            assert id(parameter) in others - decayed, name
        else:
            assert id(parameter) in decayed - others, name
    assert not is_decayed("conditioning.bias", torch.zeros(7, 8))  # a bias of two dimensions


def small_model():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model(torch.randn(4, 3)).square().sum().backward()
    return model


def test_a_step_is_adamw_by_hand():
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimizerConfig(betas=(0.9, 0.999)))
    set_rates(optimizer, 0.01, 0.1)
    norm, skipped = apply_gradients(optimizer, max_norm=0)
    assert skipped == 0
    assert norm.item() == pytest.approx(sum(p.grad.square().sum() for p in model.parameters()).sqrt().item())
    for name, parameter in model.named_parameters():
        kept = before[name] * (1 - 0.01 * 0.1 if name == "weight" else 1)
        torch.testing.assert_close(parameter, kept - 0.01 * parameter.grad / (parameter.grad.abs() + 1e-8))


def test_clipping_scales_the_gradient_down_and_reports_it_unclipped():
    model = small_model()
    optimizer = make_optimizer(model, OptimizerConfig())
    norm, _ = apply_gradients(optimizer, max_norm=0.5)
    assert norm > 0.5
    assert sum(p.grad.square().sum() for p in model.parameters()).sqrt().item() == pytest.approx(
        0.5, rel=1e-4
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, max_norm):
    model = small_model()
    optimizer = make_optimizer(model, OptimizerConfig())
    set_rates(optimizer, 0.01, 0.1)
    apply_gradients(optimizer, max_norm)
    before = {name: t.clone() for name, t in (moments(optimizer, model) | dict(model.state_dict())).items()}
    model.bias.grad[1] = bad
    _, skipped = apply_gradients(optimizer, max_norm)
    after = moments(optimizer, model) | dict(model.state_dict())
    assert skipped == 1
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert before.keys() == after.keys()


def test_moments_have_names_that_outlive_the_process():
    model = small_model()
    optimizer = make_optimizer(model, OptimizerConfig())
    assert moments(optimizer, model) == {}
    apply_gradients(optimizer, 0)
    saved = {name: tensor.clone() for name, tensor in moments(optimizer, model).items()}
    assert {name: t.shape for name, t in saved.items()} == {
        n: t.shape for n, t in expected_moments(model).items()
    }
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    twin = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    fresh = make_optimizer(twin, OptimizerConfig())
    set_moments(fresh, twin, saved)
    apply_gradients(optimizer, 0)
    apply_gradients(fresh, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert saved["step.weight"] == 1  # what was put back is a copy
