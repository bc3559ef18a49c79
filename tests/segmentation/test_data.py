import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iwm_ray.errors import UsageError
from iwm_ray.segmentation.data import IGNORED, Classes, cut, read_mask
from iwm_ray.segmentation.settings import SegmentAugmentConfig


def test_values_are_merged_and_the_others_ignored():
    classes = Classes.of_groups({"a": (0, 7), "b": (3,)})
    assert classes.names == ("a", "b")
    assert classes.lookup[[0, 7, 3, 9]].tolist() == [0, 0, 1, IGNORED]


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    size=st.sampled_from([8, 16]),
    draws=st.tuples(*[st.floats(0, 0.999)] * 4),
)
def test_a_mask_goes_where_its_image_goes(height, width, size, draws):
    """A picture of its own mask: black and white halves, cut together, still agree but at their border."""
    rows, columns = np.mgrid[:height, :width]
    mask = ((rows * 2 >= height) ^ (columns * 2 >= width)).astype(np.uint8)
    image = np.repeat(mask[:, :, None] * 255, 3, axis=2)
    for augment in (None, SegmentAugmentConfig(crop_area=0.3)):
        found, cut_mask = cut(image, mask, size, augment, np.array(draws))
        assert found.shape == (size, size, 3) and cut_mask.shape == (size, size)
        assert set(np.unique(cut_mask)) <= {0, 1}
        clear = (found[:, :, 0] < 5) | (found[:, :, 0] > 250)
        assert (found[:, :, 0] > 127)[clear].tolist() == (cut_mask == 1)[clear].tolist()


def test_the_whole_image_keeps_its_corners():
    mask = np.zeros((6, 9), np.uint8)
    mask[0, 0], mask[5, 8] = 1, 2
    image = np.zeros((6, 9, 3), np.uint8)
    _, found = cut(image, mask, 12, None, np.zeros(4))
    assert found[0, 0] == 1 and found[11, 11] == 2


def test_a_mask_of_another_size_or_kind_is_refused(tmp_path):
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_text(json.dumps("no picture"))
    assert read_mask(tmp_path / "a.png", (4, 5)).shape == (4, 5)
    for name, words in (("a", "same size"), ("b", "mode RGB"), ("c", "cannot be read")):
        with pytest.raises(UsageError, match=words):
            read_mask(tmp_path / f"{name}.png", (5, 4))
