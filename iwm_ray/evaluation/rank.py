"""Rank and spread of features: a collapse shows here first, and without labels."""

import torch
from torch import Tensor

_EPSILON = 1e-7  # RankMe, equation 1, and LiDAR: keeps the logarithm finite
_WITHIN = 1e-4  # LiDAR, section 4: delta, added to the scatter within images so that it can be inverted


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
    return torch.where(finite, _smooth_rank(values), torch.nan)


def lidar(features: Tensor) -> Tensor:
    """The rank of LiDAR (arXiv 2312.04000): how many directions tell images apart beyond what views of one differ in.

    Images are the classes of a linear discriminant analysis: exp of the entropy of the eigenvalues of
    within^(-1/2) between within^(-1/2), the scatter between images measured in units of that within them. Unlike
    RankMe it isn't raised by noise that differs from view to view.

    Args:
        features: `[k v d]` of v views of each of k images, two of each at least; as their scale falls, the constant
            delta weighs more.

    Returns:
        A float64 scalar in 1..min(k - 1, d); 1 where all images have the same mean, NaN where a feature is not finite.
        Biased where views are few (k (v - 1) < d); compare readings of equal k and v.
    """
    finite = features.isfinite().all()
    features = torch.where(finite, features.double(), 0)
    means = features.mean(1)
    deviations = (features - means[:, None]).flatten(0, 1)
    within = deviations.T @ deviations / len(deviations)
    within += _WITHIN * torch.eye(len(within), dtype=within.dtype, device=within.device)
    # Eigenvalues of the whitened scatter are the squared singular values of the whitened means.
    root, _ = torch.linalg.cholesky_ex(within)  # positive by construction: not checked, so nothing waits
    whitened = torch.linalg.solve_triangular(root, (means - means.mean(0)).T, upper=False)
    values = torch.linalg.svdvals(whitened).square() / len(means)
    return torch.where(finite, _smooth_rank(values), torch.nan)


def _smooth_rank(values: Tensor) -> Tensor:
    """exp of the entropy of `[r]` values of 0 or more as shares of their sum; 1 where all are zero."""
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + _EPSILON
    return (-(shares * shares.log()).sum()).exp().clamp_min(1)


def feature_std(features: Tensor) -> Tensor:
    """Standard deviation over the samples: `[n d]` -> `[d]`; zeros mean that no image differs from
    another."""
    return features.float().std(0, correction=0)
