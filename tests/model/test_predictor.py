import math

import pytest
import torch

from iwm_ray.config import PredictorConfig
from iwm_ray.errors import UsageError
from iwm_ray.model.encoder import fuse_attention
from iwm_ray.model.predictor import Predictor, PredictorBlock, attend

KINDS = ("none", "sequence", "feature", "adaln")
CONTEXT_IDX = torch.tensor([[0, 1, 4, 15], [2, 3, 8, 9]])
TARGET_IDX = torch.tensor([[2, 6, 10], [0, 5, 14]])


def make_predictor(kind, **changes):
    torch.manual_seed(0)
    config = PredictorConfig(depth=2, width=24, conditioning=kind, **changes)
    return Predictor(config, encoder_width=32, num_heads=2, grid=(4, 4), action_dim=3)


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 32, generator=generator), torch.randn(2, 3, generator=generator)


def open_gates(predictor):
    """AdaLN-zero starts as the identity; a few steps of training look like this."""
    for name, parameter in predictor.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return predictor


def naive_prediction(predictor, context, context_idx, target_idx, action):
    """The same function, read off METHOD section 2: one sample and one token at a time, whole blocks."""
    outputs = []
    for i in range(len(context)):
        tokens = [
            predictor.embed(context[i, j]) + predictor.positions[p] for j, p in enumerate(context_idx[i])
        ]
        for p in target_idx[i]:
            token = predictor.mask_token + predictor.positions[p]
            if hasattr(predictor.conditioning, "token_layer"):
                first = predictor.conditioning
                weight = torch.cat([first.token_layer.weight, first.action_layer.weight], dim=1)
                joined = weight @ torch.cat([token, action[i]]) + first.token_layer.bias
                token = first.layers(joined)
            tokens.append(token)
        for j in range(action.shape[1]):
            if hasattr(predictor.conditioning, "weight"):
                conditioning = predictor.conditioning
                tokens.insert(j, action[i, j] * conditioning.weight[j] + conditioning.bias[j])
        tokens = torch.stack(tokens)[None]
        embedding = predictor.conditioning.embedding(action[i : i + 1])
        for block in predictor.blocks:
            tokens = block(tokens, tokens.shape[1], embedding)
        outputs.append(predictor.unembed(predictor.norm(tokens[0, -target_idx.shape[1] :])))
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_prediction_is_the_naive_one(kind, fused):
    predictor, (context, action) = open_gates(make_predictor(kind)), inputs()
    fuse_attention(predictor, fused)
    prediction = predictor(context, CONTEXT_IDX, TARGET_IDX, action)
    expected = naive_prediction(predictor, context, CONTEXT_IDX, TARGET_IDX, action)
    assert prediction.shape == (2, 3, 32)
    torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_grid_is_both_context_and_target(kind):
    grid = torch.arange(16).expand(2, -1)
    assert make_predictor(kind)(torch.randn(2, 16, 32), grid, grid, torch.zeros(2, 3)).shape == (2, 16, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_context_tokens_does_not_matter(kind):
    predictor, (context, action) = open_gates(make_predictor(kind)), inputs()
    prediction = predictor(context, CONTEXT_IDX, TARGET_IDX, action)
    turned = predictor(context.flip(1), CONTEXT_IDX.flip(1), TARGET_IDX.flip(1), action)
    torch.testing.assert_close(turned.flip(1), prediction, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_action_changes_the_prediction_of_its_own_sample_only(kind):
    predictor, (context, action) = open_gates(make_predictor(kind)), inputs()
    other = action.clone()
    other[0, 1] += 1
    before = predictor(context, CONTEXT_IDX, TARGET_IDX, action)
    after = predictor(context, CONTEXT_IDX, TARGET_IDX, other)
    # 0 is told from 1 at every predicted position, and sample 1 does not notice.
    assert ((after[0] - before[0]).abs().amax(dim=1) > 1e-5).all()
    torch.testing.assert_close(after[1], before[1], atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_which_component_acts_is_known(kind):
    predictor, (context, _) = open_gates(make_predictor(kind)), inputs()
    unit = [
        predictor(context, CONTEXT_IDX, TARGET_IDX, torch.eye(3)[[component, component]])
        for component in range(3)
    ]
    assert min((unit[i] - unit[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-5


def test_none_does_not_depend_on_the_action_at_all():
    predictor, (context, action) = make_predictor("none"), inputs()
    action.requires_grad_()
    prediction = predictor(context, CONTEXT_IDX, TARGET_IDX, action)
    assert torch.equal(prediction, predictor(context, CONTEXT_IDX, TARGET_IDX, torch.full_like(action, 9.0)))
    assert torch.autograd.grad(prediction.sum(), action, allow_unused=True)[0] is None


def test_feature_leaves_the_context_tokens_alone_before_the_blocks():
    predictor, (context, action) = make_predictor("feature"), inputs()
    seen = []
    predictor.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    predictor(context, CONTEXT_IDX, TARGET_IDX, action)
    predictor(context, CONTEXT_IDX, TARGET_IDX, action + 1)
    assert torch.equal(seen[0][:, :4], seen[1][:, :4])
    assert ((seen[0][:, 4:] - seen[1][:, 4:]).abs().amax(dim=2) > 1e-4).all()


@pytest.mark.parametrize("kind", KINDS)
def test_all_parameters_learn_from_the_first_or_second_step(kind):
    predictor, (context, action) = make_predictor(kind), inputs()
    for _ in range(2):
        predictor.zero_grad()
        predictor(context, CONTEXT_IDX, TARGET_IDX, action).square().mean().backward()
        with torch.no_grad():
            for parameter in predictor.parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None
                    parameter -= 0.1 * parameter.grad
    still = [
        name for name, p in predictor.named_parameters() if p.requires_grad and not p.grad.abs().max() > 0
    ]
    assert still == []


@pytest.mark.parametrize("kind", ["sequence", "feature"])
def test_the_start_has_a_usable_gradient_to_the_action(kind):
    predictor, (context, action) = make_predictor(kind), inputs()
    context.requires_grad_()
    action.requires_grad_()
    loss = (predictor(context, CONTEXT_IDX, TARGET_IDX, action) - torch.ones(32)).square().sum()
    to_context, to_action = torch.autograd.grad(loss, (context, action))
    assert to_action.abs().mean() > 0.1 * to_context.abs().mean()


def test_adaln_starts_with_closed_gates_that_know_the_action():
    predictor, (context, action) = make_predictor("adaln"), inputs()
    seen = []
    predictor.norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    predictor(context, CONTEXT_IDX, TARGET_IDX, action).square().sum().backward()
    assert torch.equal(seen[0], predictor.mask_token + predictor.positions[TARGET_IDX])
    assert predictor.blocks[0].modulation.weight.grad.abs().max() > 0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("num_read", [1, 3, 5])
def test_reading_few_tokens_equals_reading_all(num_read, fused):
    torch.manual_seed(0)
    block, tokens = PredictorBlock(16, 2, qkv_bias=True), torch.randn(2, 5, 16)
    fuse_attention(block, fused)
    torch.testing.assert_close(block(tokens, num_read), block(tokens, 5)[:, -num_read:], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(attend(block.attn, tokens, num_read), block.attn(tokens)[:, -num_read:])


@pytest.mark.parametrize("kind", KINDS)
def test_task_tokens_are_seen_by_all_and_read_by_nobody(kind):
    predictor, (context, action) = open_gates(make_predictor(kind)), inputs()
    before = predictor(context, CONTEXT_IDX, TARGET_IDX, action)
    torch.manual_seed(2)
    token = torch.randn(1, 1, 24)
    after = predictor(context, CONTEXT_IDX, TARGET_IDX, action, token.expand(2, -1, -1))
    assert after.shape == before.shape
    assert ((after - before).abs().amax(dim=2) > 1e-5).all()
    # A second token like the first weighs twice in every attention: the sequence is not cut to what it was.
    twice = predictor(context, CONTEXT_IDX, TARGET_IDX, action, token.expand(2, 2, -1))
    assert not torch.allclose(twice, after, atol=1e-5)


def test_blocks_start_smaller_the_deeper_they_are():
    torch.manual_seed(0)
    config = PredictorConfig(depth=8, width=64, conditioning="none")
    predictor = Predictor(config, encoder_width=64, num_heads=1, grid=(2, 2), action_dim=0)
    for number, block in enumerate(predictor.blocks, start=1):
        assert block.mlp.fc2.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * number), rel=0.1)
        assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_what_does_not_fit_is_named():
    with pytest.raises(UsageError, match=r"predictor\.width 30"):
        Predictor(PredictorConfig(width=30), 32, 2, (4, 4), 3)
    with pytest.raises(
        UsageError, match=r"predictor\.conditioning feature: the views have no photometric action"
    ):
        Predictor(PredictorConfig(width=24), 32, 2, (4, 4), 0)
