import pytest
import torch

from iwm_ray.errors import UsageError
from iwm_ray.model.conditioning import make_conditioning


@pytest.mark.parametrize(
    ("kind", "prefix", "changes_mask_tokens", "embeds"),
    [("none", None, False, False), ("sequence", (2, 7, 8), False, False), ("feature", None, True, False),
     ("adaln", None, False, True)],
)  # fmt: skip
def test_where_the_action_enters(kind, prefix, changes_mask_tokens, embeds):
    torch.manual_seed(0)
    conditioning = make_conditioning(kind, action_dim=7, width=8)
    action, tokens = torch.randn(2, 7), torch.randn(2, 3, 8)
    tokens_before = conditioning.prefix(action)
    assert (tokens_before if tokens_before is None else tuple(tokens_before.shape)) == prefix
    assert (not torch.equal(conditioning.mask_tokens(tokens, action), tokens)) == changes_mask_tokens
    assert (conditioning.embedding(action) is not None) == embeds


def test_each_component_of_the_sequence_has_its_own_linear_layer():
    torch.manual_seed(0)
    conditioning = make_conditioning("sequence", action_dim=3, width=8)
    action = torch.randn(2, 3)
    for component in range(3):
        linear = torch.nn.Linear(1, 8)
        linear.weight.data, linear.bias.data = (
            conditioning.weight[component][:, None],
            conditioning.bias[component],
        )
        token = linear(action[:, component : component + 1])
        torch.testing.assert_close(conditioning.prefix(action)[:, component], token)


def test_positions_survive_the_feature_layers_of_a_narrow_predictor():
    torch.manual_seed(0)
    conditioning = make_conditioning("feature", action_dim=7, width=64)
    tokens, action = torch.randn(1, 16, 64), torch.randn(1, 7)
    assert conditioning.mask_tokens(tokens, action).std(dim=1).mean() > 0.02


def test_an_action_is_needed():
    assert make_conditioning("none", 0, 8).prefix(torch.zeros(1, 0)) is None
    with pytest.raises(UsageError, match="use none"):
        make_conditioning("adaln", 0, 8)
