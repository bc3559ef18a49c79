import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_ray import randomness
from iwm_ray.views.draws import Keys, between


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10**9)), min_size=1, max_size=12), st.integers(0, 20)
)
def test_a_row_of_uniforms_depends_on_its_own_key_only(keys, count):
    epochs, samples = np.array(keys, np.int64).T
    table = Keys(7, epochs, samples).uniforms("crop", count)
    assert table.shape == (len(keys), count)
    for row, (epoch, sample) in enumerate(keys):
        alone = randomness.uniforms(7, epoch, np.array([sample]), "crop", count)
        np.testing.assert_array_equal(table[row], alone[0])


def test_no_samples_draw_nothing():
    empty = np.array([], np.int64)
    assert Keys(0, empty, empty).uniforms("crop", 5).shape == (0, 5)


def test_between_reaches_from_low_to_high():
    np.testing.assert_allclose(between(-2, 6, np.array([0, 0.25, 1 - 2**-53])), [-2, 0, 6])
