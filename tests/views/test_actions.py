import numpy as np

from iwm_ray.views.actions import ActionField


def test_deviations_are_counted_in_strengths():
    field = ActionField("brightness", "factor", 1.0, 0.4)
    coded = field.encode(np.array([1.0, 1.4, 0.8], np.float32))
    assert coded.dtype == np.float32
    np.testing.assert_allclose(coded, [0, 1, -0.5], atol=1e-6)
    assert coded[0] == 0


def test_a_strength_of_zero_is_coded_as_zero():
    np.testing.assert_array_equal(ActionField("hue", "turns", 0.0, 0.0).encode(np.array([0.0, 0.3])), [0, 0])
