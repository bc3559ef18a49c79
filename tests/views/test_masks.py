import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_ray.config import MasksConfig
from iwm_ray.errors import UsageError
from iwm_ray.randomness import uniforms
from iwm_ray.views.masks import Masks, MaskSampler

GRID = (14, 14)
SAMPLER = MaskSampler.from_config(MasksConfig(), GRID)


def draw(sampler: MaskSampler, count: int, seed: int = 0) -> Masks:
    return sampler.draw(seed, np.zeros(count, np.int64), np.arange(count))


def targets(sampler: MaskSampler, masks: Masks) -> np.ndarray:
    """`[b rows columns]` true where predicted."""
    flat = np.zeros((len(masks), math.prod(sampler.grid)), bool)
    np.put_along_axis(flat, masks.target_idx.astype(np.int64), True, axis=1)
    return flat.reshape(-1, *sampler.grid)


def painted(sampler: MaskSampler, blocks: np.ndarray) -> np.ndarray:
    """The union of one image's rectangles, patch by patch."""
    union = np.zeros(sampler.grid, bool)
    for top, left, height, width in blocks:
        union[top : top + height, left : left + width] = True
    return union


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(4, 37), st.integers(4, 37)).filter(
        lambda grid: 2 / 3 <= grid[0] / grid[1] <= 3 / 2
    ),
    st.integers(1, 5),
    st.integers(0, 10**6),
)
def test_counts_are_exact_and_context_is_the_complement(grid, num_blocks, sample):
    sampler = MaskSampler.from_config(MasksConfig(num_blocks=num_blocks), grid)
    masks = sampler.draw(0, np.zeros(5, np.int64), np.arange(sample, sample + 5))
    assert masks.target_idx.shape == (5, sampler.num_target_tokens)
    assert masks.context_idx.shape == (5, sampler.num_context_tokens)
    assert masks.blocks.shape == (5, num_blocks, 4)
    assert masks.target_idx.dtype == masks.context_idx.dtype == masks.blocks.dtype == np.int16
    for target, context in zip(masks.target_idx, masks.context_idx, strict=True):
        assert (np.diff(target) > 0).all()
        assert (np.diff(context) > 0).all()
        assert sorted([*target, *context]) == list(range(math.prod(grid)))


def test_golden_masks():
    """Committed values: a change of these changes every run that anyone has recorded."""
    sampler = MaskSampler.from_config(MasksConfig(), (6, 6))
    masks = sampler.draw(5, np.array([0, 3]), np.array([7, 1_000_000]))
    assert masks.target_idx.tolist() == [
        [2, 3, 8, 9, 13, 14, 15, 18, 19, 20, 24, 25, 26, 28, 30, 31, 33, 34],
        [12, 13, 14, 18, 19, 20, 22, 23, 24, 25, 26, 27, 28, 29, 32, 33, 34, 35],
    ]
    assert masks.blocks.tolist() == [
        [[4, 3, 2, 2], [0, 2, 3, 2], [3, 0, 3, 2], [2, 1, 3, 2]],
        [[4, 4, 2, 2], [2, 0, 3, 3], [4, 2, 2, 3], [3, 4, 2, 2]],
    ]


def test_derived_number_of_target_tokens_is_the_mean_union():
    assert SAMPLER.num_target_tokens == 94
    assert SAMPLER.num_context_tokens == 102
    sizes = []
    rng = np.random.default_rng(0)
    for _ in range(1500):
        scale, aspect = rng.uniform(0.15, 0.2, 4), rng.uniform(0.75, 1.5, 4)
        height, width = np.rint(np.sqrt(196 * scale * aspect)), np.rint(np.sqrt(196 * scale / aspect))
        top, left = np.floor(rng.random(4) * (15 - height)), np.floor(rng.random(4) * (15 - width))
        blocks = np.stack([top, left, height, width], axis=1).astype(int)
        sizes.append(painted(SAMPLER, blocks).sum())
    assert abs(np.mean(sizes) - 94) < 1.5


def test_targets_are_the_union_of_the_reported_blocks_up_to_a_few_patches():
    masks = draw(SAMPLER, 500)
    wrong = []
    for mask, blocks in zip(targets(SAMPLER, masks), masks.blocks, strict=True):
        union = painted(SAMPLER, blocks)
        wrong.append((union != mask).sum())
        # the repair only adds or only removes
        assert not (union & ~mask).any() or not (mask & ~union).any()
    assert np.mean(wrong) < 1.5  # of 94
    assert max(wrong) <= 12


def test_blocks_keep_to_scale_aspect_and_grid():
    sampler = MaskSampler.from_config(MasksConfig(), (37, 37))
    top, left, height, width = np.moveaxis(draw(sampler, 500).blocks.astype(int), -1, 0)
    assert top.min() == left.min() == 0
    assert (top + height).max() == (left + width).max() == 37
    area, aspect = height * width / 37**2, height / width
    assert 0.14 < area.min() < 0.155
    assert 0.195 < area.max() < 0.215
    assert 0.7 < aspect.min() < 0.78
    assert 1.45 < aspect.max() < 1.6
    assert abs(area.mean() - 0.175) < 0.002
    assert abs(aspect.mean() - 1.125) < 0.02


def test_scale_aspect_and_place_are_drawn_independently():
    sampler = MaskSampler.from_config(MasksConfig(), (37, 37))
    top, left, height, width = np.moveaxis(draw(sampler, 1500).blocks.astype(float), -1, 0).reshape(4, -1)
    place = (top / (38 - height), left / (38 - width))
    correlation = np.corrcoef([height * width, height / width, *place]) - np.eye(4)
    assert np.abs(correlation).max() < 0.06  # 6000 blocks: 4 standard errors
    per_image = (height * width).reshape(-1, 4)
    assert abs(np.corrcoef(per_image[:, 0], per_image[:, 1])[0, 1]) < 0.12


@pytest.mark.parametrize("grid", [GRID, (4, 4), (7, 7)])
def test_no_side_of_the_image_is_favoured(grid):
    """The share of images that predict a patch is the same for a patch and its mirror images."""
    sampler = MaskSampler.from_config(MasksConfig(), grid)
    count = 4000
    share = targets(sampler, draw(sampler, count)).mean(axis=0)
    limit = 5 * math.sqrt(2 * 0.25 / count)
    assert np.abs(share - share[::-1]).max() < limit
    assert np.abs(share - share[:, ::-1]).max() < limit
    rows = share.mean(axis=1)
    assert abs(rows[-1] - rows[0]) < 0.02
    assert share.min() > 0.02  # corners lie in few blocks, but none is starved


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 10**6)), min_size=1, max_size=10),
    st.integers(0, 3),
    st.sampled_from([0, 60, 120]),
)
def test_a_sample_has_its_mask_whatever_else_is_in_the_block(keys, seed, num_target_tokens):
    sampler = MaskSampler.from_config(MasksConfig(num_target_tokens=num_target_tokens), GRID)
    block = sampler.draw(seed, *np.array(keys, np.int64).T)
    for row, key in enumerate(keys):
        alone = sampler.draw(seed, *np.array([key], np.int64).T)
        np.testing.assert_array_equal(block.target_idx[row], alone.target_idx[0])
        np.testing.assert_array_equal(block.context_idx[row], alone.context_idx[0])
        np.testing.assert_array_equal(block.blocks[row], alone.blocks[0])


def test_seed_epoch_and_sample_change_the_mask():
    zero, one = np.array([0]), np.array([1])
    base = SAMPLER.draw(0, zero, zero).target_idx
    for other in (SAMPLER.draw(1, zero, zero), SAMPLER.draw(0, one, zero), SAMPLER.draw(0, zero, one)):
        assert (other.target_idx != base).any()


@pytest.mark.parametrize("wanted", [34, 60, 130])
def test_any_reachable_number_of_target_tokens_is_met(wanted):
    sampler = MaskSampler.from_config(MasksConfig(num_target_tokens=wanted), GRID)
    masks = draw(sampler, 50)
    assert masks.target_idx.shape == (50, wanted)
    assert masks.context_idx.shape == (50, 196 - wanted)


def test_repair_adds_and_removes_uniformly():
    """Far from the mean union many patches are repaired: they must not gather at one end of the raster."""
    for wanted in (50, 150):
        sampler = MaskSampler.from_config(MasksConfig(num_target_tokens=wanted, num_blocks=4), GRID)
        masks = draw(sampler, 1000)
        unions = np.stack([painted(sampler, blocks) for blocks in masks.blocks])
        repaired = targets(sampler, masks) ^ unions
        pool = unions if wanted == 50 else ~unions
        share = repaired.sum(axis=(0, 2)) / np.maximum(pool.sum(axis=(0, 2)), 1)
        assert repaired.sum() > 1000
        assert np.abs(share[:7].mean() / share[7:].mean() - 1) < 0.25


def test_no_samples_make_no_masks():
    empty = np.array([], np.int64)
    masks = SAMPLER.draw(0, empty, empty)
    assert masks.target_idx.shape == (0, 94)
    assert masks.context_idx.shape == (0, 102)


@pytest.mark.parametrize(
    ("config", "grid", "words"),
    [
        (
            MasksConfig(block_scale=(0.15, 1.0), block_aspect=(0.5, 1.5)),
            GRID,
            ("masks.block_scale", "masks.block_aspect"),
        ),
        (MasksConfig(block_scale=(0.15, 0.9), block_aspect=(0.2, 1.0)), GRID, ("do not fit", "14 x 14")),
        (MasksConfig(block_scale=(0.001, 0.2)), GRID, ("masks.block_scale 0.001 0.2", "at least 1 x 1")),
        (
            MasksConfig(block_scale=(1.0, 1.0), block_aspect=(1.0, 1.0)),
            GRID,
            ("masks.num_target_tokens 196", "at most 195"),
        ),
        (MasksConfig(num_target_tokens=196), GRID, ("masks.num_target_tokens 196", "at most 195")),
        (MasksConfig(num_target_tokens=9999), GRID, ("masks.num_target_tokens 9999", "at most 195")),
        (MasksConfig(num_target_tokens=3), GRID, ("masks.num_target_tokens 3", "masks.num_blocks 4")),
        (
            MasksConfig(num_target_tokens=150, num_blocks=2),
            GRID,
            ("masks.num_target_tokens 150", "masks.num_blocks 2"),
        ),
        (MasksConfig(), (1, 1), ("masks.block_scale", "1 x 1")),
    ],
)
def test_impossible_settings_are_refused_in_one_line(config, grid, words):
    with pytest.raises(UsageError) as failure:
        MaskSampler.from_config(config, grid)
    message = str(failure.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)).filter(lambda grid: math.prod(grid) > 1),
    st.data(),
    st.integers(0, 10**6),
)
def test_random_masks_have_exact_counts_and_list_their_patches(grid, data, sample):
    wanted = data.draw(st.integers(1, math.prod(grid) - 1))
    sampler = MaskSampler.from_config(MasksConfig(style="random", num_target_tokens=wanted), grid)
    masks = sampler.draw(0, np.zeros(3, np.int64), np.arange(sample, sample + 3))
    assert masks.target_idx.shape == (3, wanted)
    assert masks.target_idx.dtype == masks.context_idx.dtype == masks.blocks.dtype == np.int16
    for target, context, blocks in zip(masks.target_idx, masks.context_idx, masks.blocks, strict=True):
        assert (np.diff(target) > 0).all() and (np.diff(context) > 0).all()
        assert sorted([*target, *context]) == list(range(math.prod(grid)))
        assert (blocks[:, 2:] == 1).all()
        np.testing.assert_array_equal(np.flatnonzero(painted(sampler, blocks)), target)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 10**6)), min_size=1, max_size=10), st.integers(0, 3)
)
def test_a_random_mask_is_that_of_its_sample_alone(keys, seed):
    sampler = MaskSampler.from_config(MasksConfig(style="random"), GRID)
    block = sampler.draw(seed, *np.array(keys, np.int64).T)
    for row, key in enumerate(keys):
        alone = sampler.draw(seed, *np.array([key], np.int64).T)
        np.testing.assert_array_equal(block.target_idx[row], alone.target_idx[0])
        np.testing.assert_array_equal(block.context_idx[row], alone.context_idx[0])


def test_a_random_mask_is_the_slow_choice_of_the_smallest_numbers():
    sampler = MaskSampler.from_config(MasksConfig(style="random"), (4, 4))
    masks = draw(sampler, 20, seed=3)
    for sample in range(20):
        numbers = uniforms(3, 0, np.array([sample]), "mask_random", 16)[0].tolist()
        smallest = sorted(range(16), key=lambda patch: numbers[patch])[:12]
        assert masks.target_idx[sample].tolist() == sorted(smallest)


def test_golden_random_masks():
    """Committed values: a change of these changes every MAE run that anyone has recorded."""
    sampler = MaskSampler.from_config(MasksConfig(style="random"), (4, 4))
    masks = sampler.draw(5, np.array([0, 3]), np.array([7, 1_000_000]))
    assert masks.context_idx.tolist() == [[6, 7, 12, 15], [1, 9, 11, 15]]


def test_random_masks_take_three_quarters_and_any_patch_as_often_as_any_other():
    sampler = MaskSampler.from_config(MasksConfig(style="random"), GRID)
    assert (sampler.num_target_tokens, sampler.num_context_tokens) == (147, 49)  # He et al.: 75 %
    chosen = targets(sampler, draw(sampler, 4000)).reshape(4000, -1).astype(float)
    share = chosen.mean(axis=0)
    assert np.abs(share - 0.75).max() < 5 * math.sqrt(0.75 * 0.25 / 4000)
    # Neighbours are no likelier together than others: -1 / (n - 1) for any two, as without replacement.
    beside = np.mean([np.corrcoef(chosen[:, i], chosen[:, i + 1])[0, 1] for i in range(0, 194, 2)])
    assert abs(beside + 1 / 195) < 5 / math.sqrt(4000 * 97)


def test_random_masks_ask_for_no_blocks_that_fit():
    """Grids and counts that no rectangles would give."""
    for grid, wanted in (((1, 2), 1), ((3, 3), 8), (GRID, 3)):
        sampler = MaskSampler.from_config(MasksConfig(style="random", num_target_tokens=wanted), grid)
        assert draw(sampler, 2).target_idx.shape == (2, wanted)
    for wanted, grid in ((196, GRID), (0, (1, 1))):
        with pytest.raises(UsageError, match=r"masks.num_target_tokens .* lower it$"):
            MaskSampler.from_config(MasksConfig(style="random", num_target_tokens=wanted), grid)
