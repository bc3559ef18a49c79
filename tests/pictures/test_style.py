import numpy as np
import pytest
from matplotlib.figure import Figure

from iwm_ray.pictures.style import show_image


@pytest.mark.parametrize(("size", "interpolation"), [(32, "nearest"), (224, "antialiased")])
def test_few_pixels_stay_pixels(size: int, interpolation: str) -> None:
    axes = Figure().add_subplot()
    show_image(axes, np.zeros((size, size, 3), np.uint8), frame="red")
    assert axes.images[0].get_interpolation() in (interpolation, "auto")
    assert list(axes.get_xticks()) == []


def test_what_cannot_be_read_is_found(legible) -> None:
    """The check of the other tests can fail."""
    figure = Figure()
    figure.text(0.5, 0.5, "one text")
    figure.text(0.52, 0.51, "over another")
    with pytest.raises(AssertionError, match="over another"):
        legible(figure)
    figure = Figure()
    figure.text(0.98, 0.5, "over the edge")
    with pytest.raises(AssertionError, match="over the edge"):
        legible(figure)
