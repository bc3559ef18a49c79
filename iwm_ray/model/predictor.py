"""The predictor, the world model itself: p(context tokens, action, positions) -> target tokens (IWM, section 3.2)."""

import math

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from iwm_ray.config import PredictorConfig
from iwm_ray.model.conditioning import make_conditioning
from iwm_ray.model.encoder import check_token_width, sincos_positions


class Predictor(nn.Module):
    """A narrow Vision Transformer over the context tokens and one mask token for every position to predict.

    One pass predicts all positions: context and mask tokens see each other, as in the paper.

    Args:
        config: depth, width and conditioning.
        encoder_width: width of the tokens that come in.
        num_heads: attention heads; they must divide the width.
        grid: (rows, columns) of patches.
        action_dim: length of the action.
        target_width: width of the tokens that go out; None: as those that come in.

    Raises:
        UsageError: the width does not fit, or the conditioning lacks an action.
    """

    def __init__(
        self,
        config: PredictorConfig,
        encoder_width: int,
        num_heads: int,
        grid: tuple[int, int],
        action_dim: int,
        target_width: int | None = None,
    ) -> None:
        super().__init__()
        self.target = config.target
        check_token_width("predictor", config.width, num_heads)
        block = AdaLNBlock if config.conditioning == "adaln" else PredictorBlock
        self.embed = nn.Linear(encoder_width, config.width)
        self.positions = nn.Parameter(sincos_positions(grid, config.width), requires_grad=False)
        self.mask_token = nn.Parameter(torch.zeros(config.width))
        self.blocks = nn.ModuleList(
            block(config.width, num_heads, qkv_bias=True) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.unembed = nn.Linear(config.width, target_width or encoder_width)
        self._initialize()
        self.conditioning = make_conditioning(config.conditioning, action_dim, config.width)

    def forward(
        self,
        context: Tensor,
        context_idx: Tensor,
        target_idx: Tensor,
        action: Tensor,
        task_tokens: Tensor | None = None,
    ) -> Tensor:
        """Predicts the target tokens at `target_idx`.

        Args:
            context: `[b c d]` tokens of the context encoder.
            context_idx: `[b c]` int64, their positions.
            target_idx: `[b t]` int64, positions to predict; both may be the full grid.
            action: `[b a]` float32, what leads from source to target.
            task_tokens: `[b k w]`, in the predictor's width, stand before all others (multi-task finetuning).

        Returns:
            `[b t d]` predictions in the (layer-normed) space of the targets.
        """
        context = self.embed(context) + self.positions[context_idx]
        mask_tokens = self.conditioning.mask_tokens(self.mask_token + self.positions[target_idx], action)
        prefix, embedding = self.conditioning.prefix(action), self.conditioning.embedding(action)
        parts = (task_tokens, prefix, context, mask_tokens)
        tokens = torch.cat([part for part in parts if part is not None], dim=1)
        for block in self.blocks[:-1]:
            tokens = block(tokens, tokens.shape[1], embedding)
        tokens = self.blocks[-1](tokens, target_idx.shape[1], embedding)
        return self.unembed(self.norm(tokens))

    def _initialize(self) -> None:
        """As I-JEPA: normal of 0.02, and each block's last projections divided by sqrt(2 x its number)."""
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for number, block in enumerate(self.blocks, start=1):
            assert isinstance(block, PredictorBlock)
            block.rescale(1 / math.sqrt(2 * number))


class PredictorBlock(Block):
    """A Transformer block that can leave out what nobody reads: after the last one, only the mask tokens are."""

    def forward(self, tokens: Tensor, num_read: int, embedding: Tensor | None = None) -> Tensor:
        """`[b n w]` -> `[b num_read w]`: the last `num_read` tokens, which have attended to all n."""
        tokens = tokens[:, -num_read:] + attend(self.attn, self.norm1(tokens), num_read)
        return tokens + self.mlp(self.norm2(tokens))

    def rescale(self, factor: float) -> None:
        """Shrinks what the block adds to the tokens at the start."""
        with torch.no_grad():
            self.attn.proj.weight.mul_(factor)
            self.mlp.fc2.weight.mul_(factor)


class AdaLNBlock(PredictorBlock):
    """A block whose two halves are shifted, scaled and gated by an embedding; closed gates at the start (AdaLN-zero)."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__(width, num_heads, qkv_bias=qkv_bias)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, tokens: Tensor, num_read: int, embedding: Tensor | None = None) -> Tensor:
        assert embedding is not None
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(embedding)[:, None].chunk(
            6, dim=-1
        )
        normed = self.norm1(tokens) * (1 + scale) + shift
        tokens = tokens[:, -num_read:] + gate * attend(self.attn, normed, num_read)
        return tokens + mlp_gate * self.mlp(self.norm2(tokens) * (1 + mlp_scale) + mlp_shift)

    def rescale(self, factor: float) -> None:
        nn.init.zeros_(self.modulation.weight)  # instead of a smaller start: none at all
        nn.init.zeros_(self.modulation.bias)


def attend(attention: Attention, tokens: Tensor, num_read: int) -> Tensor:
    """Self-attention of timm's layer, with queries from the last `num_read` tokens only.

    Returns:
        `[b num_read w]`.
    """
    if num_read == tokens.shape[1]:
        return attention(tokens)
    weight, bias, width = attention.qkv.weight, attention.qkv.bias, tokens.shape[-1]
    heads = (attention.num_heads, -1)
    query = F.linear(tokens[:, -num_read:], weight[:width], bias[:width]).unflatten(-1, heads).transpose(1, 2)
    key_value = F.linear(tokens, weight[width:], bias[width:]).unflatten(-1, (2, *heads))
    key, value = key_value.permute(2, 0, 3, 1, 4).unbind(0)
    if attention.fused_attn:
        mixed = F.scaled_dot_product_attention(query, key, value)
    else:
        mixed = (query * attention.scale @ key.transpose(-2, -1)).softmax(dim=-1) @ value
    return attention.proj(mixed.transpose(1, 2).flatten(2))
