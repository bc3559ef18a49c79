import numpy as np
import pytest

from iwm_ray.pictures.segmentation import class_colours, segmentation_sheet


@pytest.mark.parametrize("count", [2, 8, 9, 59])
def test_every_class_has_a_colour_of_its_own(count):
    assert len({tuple(colour) for colour in class_colours(count)}) == count


def test_the_sheet_shows_truth_and_predictions_in_the_same_colours():
    truth = np.array([[[0, 1], [2, 255]]])
    images = np.zeros((1, 2, 2, 3), np.uint8)
    figure = segmentation_sheet(
        images, truth, {"ours": truth.copy()}, ("sky", "sea", "land", "unseen"), "title"
    )
    shown = [axes.images[0].get_array() for axes in figure.axes]
    np.testing.assert_array_equal(shown[1], shown[2])
    assert shown[1][1, 1].tolist() == [255, 255, 255]  # ignored
    assert [axes.get_title() for axes in figure.axes] == ["image", "truth", "ours"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sky", "sea", "land"]
