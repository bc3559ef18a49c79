import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_ray.evaluation.rank import feature_std, rankme


@pytest.mark.parametrize("width", [1, 4, 16])
def test_equal_directions_have_full_rank(width: int) -> None:
    assert float(rankme(torch.eye(width).repeat(3, 1))) == pytest.approx(width, rel=1e-4)


def test_constant_features_have_rank_one() -> None:
    assert float(rankme(torch.ones(20, 8))) == pytest.approx(1, abs=1e-4)
    assert float(rankme(torch.zeros(20, 8))) == pytest.approx(1, abs=1e-4)


def test_a_case_by_hand() -> None:
    # Singular values 3 and 1: shares 3/4 and 1/4.
    features = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(rankme(features)) == pytest.approx(math.exp(entropy), rel=1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100), rank=st.integers(1, 6))
def test_scale_order_and_rotation_change_nothing_and_rank_bounds_it(
    seed: int, scale: float, rank: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(30, rank, generator=generator) @ torch.randn(rank, 10, generator=generator)
    rotation = torch.linalg.qr(torch.randn(10, 10, generator=generator)).Q
    value = float(rankme(features))
    assert 1 <= value <= rank + 0.01
    moved = scale * features[torch.randperm(30, generator=generator)] @ rotation
    assert float(rankme(moved)) == pytest.approx(value, rel=1e-2)


def test_feature_std_by_hand() -> None:
    assert feature_std(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).tolist() == [1.0, 0.0]


def test_features_that_are_not_finite_have_no_rank() -> None:
    assert math.isnan(float(rankme(torch.tensor([[1.0, math.nan], [3.0, 5.0]]))))
