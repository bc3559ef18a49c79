"""Distances between predictions and a bank, and the rank of the true candidate among them."""

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor

_TIE = 1e-9  # distances are float64 of the order of 1: equal views differ by 1e-15, others by far more
_TOKENS_AT_ONCE = 64  # turned to float64 at a time: bounds the memory beside the float32 tokens


def token_distances(predictions: Tensor, bank: Tensor) -> Tensor:
    """Mean over the tokens of the squared L2, as a share of the mean squared length of the bank's tokens.

    In float64: near a good prediction |p|^2 - 2 pq + |q|^2 cancels to the last digits of float32. The share
    makes distances comparable to one tolerance; the ranks do not depend on it.

    Args:
        predictions: `[p n d]`.
        bank: `[k n d]`.

    Returns:
        `[p k]` float64, 0 or more.
    """
    distances = torch.zeros(len(predictions), len(bank), dtype=torch.float64, device=bank.device)
    length = torch.zeros((), dtype=torch.float64, device=bank.device)
    for some_predictions, some_bank in zip(
        predictions.split(_TOKENS_AT_ONCE, dim=1), bank.split(_TOKENS_AT_ONCE, dim=1), strict=True
    ):
        p, q = some_predictions.flatten(1).double(), some_bank.flatten(1).double()
        squares = torch.linalg.vector_norm(q, dim=1).square()
        distances += p.square().sum(1)[:, None] + squares - 2 * (p @ q.T)
        length += squares.mean()
    return distances.clamp_min(0) / length.clamp_min(torch.finfo(torch.float64).tiny)


def pooled_distances(predictions: Tensor, bank: Tensor) -> Tensor:
    """1 - cosine of the mean tokens: `[p n d]` and `[k n d]` -> `[p k]` float64, 0..2."""
    p, q = (F.normalize(tokens.mean(1, dtype=torch.float64), dim=1) for tokens in (predictions, bank))
    return 1 - p @ q.T


def average_ranks(distances: Tensor, true: Tensor) -> Tensor:
    """The rank of candidate `true[i]` in row i, the nearest being 1; equal distances share the mean of their ranks.

    Args:
        distances: `[m n]` float64, of the order of 1.
        true: `[m]` int64 columns.

    Returns:
        `[m]` float64 in 1..n, whole or half numbers.
    """
    own = distances.gather(1, true[:, None])
    nearer = (distances < own - _TIE).sum(1)
    equal = ((distances - own).abs() <= _TIE).sum(1)  # counts itself
    return nearer + (equal.double() + 1) / 2


def chance_mrr(num_candidates: int) -> float:
    """MRR of a random order: the mean of 1 / rank over all ranks."""
    return sum(1 / rank for rank in range(1, num_candidates + 1)) / num_candidates
