import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_ray.randomness import integers, uniforms


def test_golden_values_never_change():
    found = uniforms(0, 0, np.arange(2), "crop", 3)
    expected = [
        [0.9493365160838243, 0.3650210564042037, 0.6786267159018405],
        [0.6999199880178028, 0.2605406088054219, 0.6347177814294117],
    ]
    np.testing.assert_allclose(found, expected, atol=1e-8)
    assert integers(7, 3, "order", 2).tolist() == [int(value) for value in integers(7, 3, "order", 9)[:2]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(1, 40), st.integers(0, 2**40))
def test_a_draw_depends_on_its_key_alone(seed, epoch, count, sample):
    alone = uniforms(seed, epoch, np.array([sample]), "source", count)
    among = uniforms(seed, epoch, np.array([sample + 1, sample, 5]), "source", count + 9)
    np.testing.assert_array_equal(alone[0], among[1, :count])
    assert ((alone >= 0) & (alone < 1)).all()


@pytest.mark.parametrize("change", [(1, 0, "crop"), (0, 1, "crop"), (0, 0, "mask")])
def test_seed_epoch_and_purpose_each_give_other_draws(change):
    samples = np.arange(100)
    seed, epoch, purpose = change
    assert (
        np.abs(
            np.corrcoef(
                uniforms(0, 0, samples, "crop", 8).ravel(), uniforms(seed, epoch, samples, purpose, 8).ravel()
            )[0, 1]
        )
        < 0.15
    )


def test_draws_are_uniform():
    values = np.sort(uniforms(3, 1, np.arange(20_000), "flip", 1)[:, 0])
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand tries; the key is fixed, so always or never.
    assert np.abs(values - np.arange(20_000) / 20_000).max() < 1.95 / np.sqrt(20_000)
