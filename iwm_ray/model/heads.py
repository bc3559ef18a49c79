"""Heads: from tokens to classes, for probes on frozen features and for finetuning (METHOD, section 5)."""

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn

from iwm_ray.model.batch_norm import BatchNorm


class LinearHead(nn.Module):
    """Mean over the tokens, batch normalisation without affine, one linear layer.

    The normalisation makes learning rates comparable between encoders, as in the linear probes of MAE and I-JEPA.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = BatchNorm(width, affine=False, eps=1e-6)
        self.classify = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[b n d]` tokens, or `[b d]` features that are pooled already -> `[b c]` logits."""
        pooled = tokens.mean(1) if tokens.ndim == 3 else tokens
        return self.classify(self.norm(pooled))


class AttentiveHead(nn.Module):
    """One learned query, one cross-attention block over the tokens, one linear layer (V-JEPA's attentive probe)."""

    def __init__(self, width: int, num_classes: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.norm_tokens = nn.LayerNorm(width, eps=1e-6)
        self.to_query = nn.Linear(width, width)
        self.to_key_value = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.classify = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.query, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[b n d]` tokens -> `[b c]` logits."""
        return self.classify(self.pool(tokens))

    def pool(self, tokens: Tensor) -> Tensor:
        """`[b n d]` -> `[b d]`: what the query has gathered."""
        tokens = self.norm_tokens(tokens)
        heads = (self.num_heads, -1)
        # Not len(tokens): torch.export would take it for a constant.
        query = self.to_query(self.query).expand(tokens.shape[0], -1, -1).unflatten(-1, heads).transpose(1, 2)
        key, value = self.to_key_value(tokens).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        pooled = self.query + self.project(mixed)
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]
