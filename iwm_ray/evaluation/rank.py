"""Rank and spread of features: a collapse shows here first, and without labels."""

import torch
from torch import Tensor

_EPSILON = 1e-7  # RankMe, equation 1: keeps the logarithm finite


def rankme(features: Tensor) -> Tensor:
    """The smooth rank of RankMe (arXiv 2210.02885): exp of the entropy of the singular values.

    Features are not centred, as there. 1: every feature is a multiple of one vector; min(n, d): all
    directions alike.

    Args:
        features: `[n d]`, any scale.

    Returns:
        A scalar in 1..min(n, d); 1 where every feature is zero, NaN where one is not finite.
    """
    finite = features.isfinite().all()
    values = torch.linalg.svdvals(torch.where(finite, features.float(), 0))  # it refuses what is not finite
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + _EPSILON
    rank = (-(shares * shares.log()).sum()).exp().clamp_min(1)
    return torch.where(finite, rank, torch.nan)


def feature_std(features: Tensor) -> Tensor:
    """Standard deviation over the samples: `[n d]` -> `[d]`; zeros mean that no image differs from
    another."""
    return features.float().std(0, correction=0)
