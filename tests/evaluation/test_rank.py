import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_ray.evaluation.rank import feature_std, lidar, rankme


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


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_images=st.integers(2, 12),
    num_views=st.integers(2, 5),
    width=st.integers(1, 8),
)
def test_lidar_agrees_with_the_papers_formula(seed: int, num_images: int, num_views: int, width: int) -> None:
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(num_images, 1, width)) + generator.normal(
        size=(num_images, num_views, width)
    )
    between, within, grand = np.zeros((width, width)), 1e-4 * np.eye(width), features.mean((0, 1))
    for image in features:
        mean = image.mean(0)
        between += np.outer(mean - grand, mean - grand) / num_images
        for view in image:
            within += np.outer(view - mean, view - mean) / (num_images * num_views)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    values = np.linalg.eigvalsh(root @ between @ root).clip(0)
    shares = values / values.sum() + 1e-7
    expected = max(1, math.exp(-(shares * np.log(shares)).sum()))
    assert float(lidar(torch.from_numpy(features))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("num_images", [2, 5, 9])
def test_lidar_of_orthogonal_images_is_one_less_than_their_number(num_images: int) -> None:
    features = torch.eye(num_images)[:, None].expand(-1, 3, -1)
    assert float(lidar(features)) == pytest.approx(num_images - 1, rel=1e-3)


def test_lidar_of_equal_images_is_one_however_much_views_differ() -> None:
    assert float(lidar(torch.ones(6, 4, 8))) == pytest.approx(1, abs=1e-4)
    views = torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(0))
    assert float(lidar(views.expand(6, -1, -1))) == pytest.approx(1, abs=1e-4)
    assert float(rankme(views[0])) > 5


def test_lidar_does_not_count_what_only_views_differ_in() -> None:
    """Two directions tell images apart; noise of views in six others lifts RankMe, not LiDAR."""
    generator = torch.Generator().manual_seed(0)
    features = 0.1 * torch.randn(200, 20, 8, generator=generator)
    features[:, :, :2] += torch.randn(200, 1, 2, generator=generator)
    features[:, :, 2:] *= 10
    assert float(lidar(features)) == pytest.approx(2, abs=0.1)
    assert float(rankme(features.flatten(0, 1))) > 6


def test_lidar_of_features_that_are_not_finite_is_not_a_number() -> None:
    features = torch.ones(3, 2, 4)
    features[1, 0, 2] = math.inf
    assert math.isnan(float(lidar(features)))
