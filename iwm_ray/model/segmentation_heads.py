"""Heads from tokens on the patch grid to classes of pixels; their logits are at patch resolution."""

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn

from iwm_ray.model.batch_norm import BatchNorm

_BINS = (1, 2, 3, 6)  # sides of the pyramid's grids (Zhao et al., arXiv 1612.01105)


class LinearSegmentation(nn.Module):
    """Batch normalisation without affine, then one linear layer for each patch."""

    def __init__(self, width: int, num_classes: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.norm = BatchNorm(width, affine=False, eps=1e-6)
        self.classify = nn.Conv2d(width, num_classes, 1)
        nn.init.trunc_normal_(self.classify.weight, std=0.01)
        assert self.classify.bias is not None
        nn.init.zeros_(self.classify.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[b n d]` tokens of the whole grid -> `[b c rows columns]` logits."""
        return self.classify(self.norm(to_map(tokens, self.grid)))


class PyramidSegmentation(nn.Module):
    """Pyramid pooling over the grid and a fusion, at patch resolution.

    UPerNet (Xiao et al., arXiv 1807.10221) fuses several resolutions besides; a plain ViT's tokens have one.
    """

    def __init__(self, width: int, num_classes: int, grid: tuple[int, int], channels: int = 128) -> None:
        super().__init__()
        self.grid = grid
        self.bins = tuple(size for size in _BINS if size <= min(grid))
        self.norm = BatchNorm(width, affine=False, eps=1e-6)
        self.narrow = nn.ModuleList(nn.Conv2d(width, channels, 1) for _ in self.bins)
        self.fuse = nn.Sequential(
            nn.Conv2d(width + len(self.bins) * channels, channels, 3, padding=1, bias=False),
            BatchNorm(channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            BatchNorm(channels),
            nn.GELU(),
        )
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[b n d]` tokens of the whole grid -> `[b c rows columns]` logits."""
        features = self.norm(to_map(tokens, self.grid))
        levels = [features]
        for size, narrow in zip(self.bins, self.narrow, strict=True):
            pooled = F.gelu(narrow(F.adaptive_avg_pool2d(features, size)))
            levels.append(upsample(pooled, self.grid))
        return self.classify(self.fuse(torch.cat(levels, dim=1)))


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[b n d]` -> `[b d rows columns]`."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def upsample(maps: Tensor, shape: tuple[int, int]) -> Tensor:
    """`[b c rows columns]` -> `[b c h w]`, bilinear."""
    return F.interpolate(maps, shape, mode="bilinear", align_corners=False)
