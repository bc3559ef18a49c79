"""How the action enters the predictor (IWM, section 3.2; METHOD: conditioning).

Every kind answers the same three questions: which tokens stand before the others, what becomes of the mask
tokens, and which embedding modulates the blocks. The layers here keep torch's own initialisation, which is
scaled by the number of
inputs: a narrow predictor would otherwise shrink the action (and, in `feature`, the positions) to nothing.
"""

import torch
from torch import Tensor, nn

from iwm_ray import config
from iwm_ray.errors import UsageError


class Conditioning(nn.Module):
    """`none`: no action enters, so the predictor cannot undo a photometric change (Table: MRR at chance)."""

    def prefix(self, action: Tensor) -> Tensor | None:
        """`[b a]` -> `[b k w]` tokens that stand before the others, or None."""
        return None

    def mask_tokens(self, tokens: Tensor, action: Tensor) -> Tensor:
        """`[b t w]` mask tokens with their positions, `[b a]` -> `[b t w]`."""
        return tokens

    def embedding(self, action: Tensor) -> Tensor | None:
        """`[b a]` -> `[b w]`, what modulates the blocks, or None."""
        return None


class SequenceConditioning(Conditioning):
    """`sequence`: one more token for each component of the action; what comes out at these tokens is not
    read.

    Each component has its own affine map from a number to a token: a shared one would lose which is which.
    """

    def __init__(self, action_dim: int, width: int) -> None:
        super().__init__()
        # nn.Linear(1, width)'s initialisation, action_dim times.
        self.weight = nn.Parameter(torch.empty(action_dim, width).uniform_(-1, 1))
        self.bias = nn.Parameter(torch.empty(action_dim, width).uniform_(-1, 1))

    def prefix(self, action: Tensor) -> Tensor:
        return action[:, :, None] * self.weight + self.bias


class FeatureConditioning(Conditioning):
    """`feature`: the action is joined to every mask token; three linear layers with ReLU bring it back to the
    width.

    The first layer of the concatenation is the sum of two maps, so the action is mapped once a sample, not
    once a token.
    """

    def __init__(self, action_dim: int, width: int) -> None:
        super().__init__()
        self.token_layer = nn.Linear(width, width)
        self.action_layer = nn.Linear(action_dim, width, bias=False)
        self.layers = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def mask_tokens(self, tokens: Tensor, action: Tensor) -> Tensor:
        return self.layers(self.token_layer(tokens) + self.action_layer(action)[:, None])


class AdaLNConditioning(Conditioning):
    """`adaln`: the embedded action shifts, scales and gates every block (AdaLN-zero: Peebles and Xie, arXiv
    2212.09748).

    Differs: beyond the paper, as later action-conditioned world models do it.
    """

    def __init__(self, action_dim: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(action_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def embedding(self, action: Tensor) -> Tensor:
        return self.layers(action)


def make_conditioning(kind: config.Conditioning, action_dim: int, width: int) -> Conditioning:
    """The conditioning of that name.

    Raises:
        UsageError: the views have no action to condition on.
    """
    if kind == "none":
        return Conditioning()
    if action_dim == 0:
        raise UsageError(f"predictor.conditioning {kind}: the views have no photometric action; use none")
    kinds = {"sequence": SequenceConditioning, "feature": FeatureConditioning, "adaln": AdaLNConditioning}
    return kinds[kind](action_dim, width)
