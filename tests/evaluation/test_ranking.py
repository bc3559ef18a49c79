import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iwm_ray.evaluation.ranking import average_ranks, chance_mrr, pooled_distances, token_distances


def _own_ranks(distances: Tensor) -> Tensor:
    """Candidate i is the true one of row i."""
    return average_ranks(distances, torch.arange(len(distances)))


def test_chance_is_the_mean_reciprocal_of_all_ranks() -> None:
    assert chance_mrr(2) == 0.75
    assert chance_mrr(256) == pytest.approx(0.0239, abs=5e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), num=st.integers(2, 12), num_values=st.integers(1, 6))
def test_average_ranks_agree_with_scipy_and_move_with_the_bank(seed: int, num: int, num_values: int) -> None:
    from scipy.stats import rankdata

    generator = np.random.default_rng(seed)
    distances = generator.integers(0, num_values, (num, num)) / 10
    expected = np.array([rankdata(row)[place] for place, row in enumerate(distances)])
    assert np.array_equal(_own_ranks(torch.tensor(distances)).numpy(), expected)
    order = generator.permutation(num)
    assert np.array_equal(_own_ranks(torch.tensor(distances[order][:, order])).numpy(), expected[order])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), num_tokens=st.sampled_from([1, 3, 64, 65, 130]))
def test_token_distances_agree_with_the_formula(seed: int, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randn(3, num_tokens, 5, generator=generator)
    bank = torch.randn(4, num_tokens, 5, generator=generator)
    slow = (predictions[:, None].double() - bank[None].double()).square().sum(3).mean(2)
    expected = slow / bank.double().square().sum(2).mean()
    assert torch.allclose(token_distances(predictions, bank), expected, rtol=1e-12, atol=1e-12)
    means = predictions.double().mean(1)[:, None], bank.double().mean(1)[None]
    cosine = torch.nn.functional.cosine_similarity(*means, dim=2)
    assert torch.allclose(pooled_distances(predictions, bank), 1 - cosine, atol=1e-12)


def test_nearly_equal_views_are_told_apart_and_equal_ones_tie() -> None:
    """Differences of one part in a million drown in float32: 1 - 2 + 1 keeps no digit of them."""
    base = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    bank = torch.stack([base, base, base * (1 + 1e-4), base * (1 + 3e-4), base + 1])
    ranks = _own_ranks(token_distances(bank, bank))
    assert ranks.tolist() == [1.5, 1.5, 1, 1, 1]
    # From a prediction at the second place, the others follow in the order of their scales.
    assert token_distances(bank[2:3], bank)[0].argsort()[0] == 2
