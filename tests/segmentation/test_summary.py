import numpy as np
import pytest

from iwm_ray.evaluation.intervals import repetitions_interval
from iwm_ray.finetuning.arms import Family
from iwm_ray.segmentation.network import count_pixels
from iwm_ray.segmentation.summary import class_iou, constant_counts, lines, miou, summarise


@pytest.fixture
def pictures():
    generator = np.random.default_rng(0)
    return generator.integers(0, 3, (2, 7, 5, 5))


def counts(predicted, classes, num_classes=4):
    return np.stack(
        [count_pixels(one, other, num_classes) for one, other in zip(predicted, classes, strict=True)]
    )


def test_intersection_over_union_is_that_of_all_pixels_together(pictures):
    predicted, classes = pictures
    found = class_iou(counts(predicted, classes), np.ones(7))
    for number in range(3):
        ours, theirs = predicted == number, classes == number
        assert found[number] == pytest.approx((ours & theirs).sum() / (ours | theirs).sum())
    assert np.isnan(found[3])


def test_weights_are_repetitions(pictures):
    predicted, classes = pictures
    weights = np.array([2.0, 0, 1, 0, 3, 1, 0])
    repeated = np.repeat(np.arange(7), weights.astype(int))
    expected = class_iou(counts(predicted[repeated], classes[repeated]), np.ones(len(repeated)))
    np.testing.assert_allclose(class_iou(counts(predicted, classes), weights), expected)


def test_the_best_constant_answer(pictures):
    _, classes = pictures
    present = np.array([True, True, True, False])
    shares = np.bincount(classes.ravel(), minlength=3) / classes.size
    found = miou(constant_counts(counts(classes, classes)), np.ones(7), present)
    assert found == pytest.approx(shares.max() / 3)


def test_a_perfect_network_beside_its_control(pictures):
    predicted, classes = pictures
    perfect, control = (Family("predictor", start, ("shapes",)) for start in ("pretrained", "random"))
    found = summarise(
        {perfect: {0: counts(classes, classes)}, control: {0: counts(predicted, classes)}}, "abcd", "shapes"
    )
    metrics = found["metrics"]
    assert metrics["finetune/shapes/miou"] == metrics["finetune/shapes/miou_low"] == 1
    below = metrics["finetune/shapes/miou_random_predictor"]
    assert metrics["finetune/shapes/miou_random_predictor_low"] < below < 0.5
    assert metrics["finetune/shapes/miou_difference"] == pytest.approx(1 - below)
    assert [row["class"] for row in found["classes"]] == ["a", "b", "c"] * 2  # no pixel is d
    assert sum(row["pixels"] for row in found["classes"][:3]) == pytest.approx(1)
    said = "\n".join(lines(found | {"efficiency": []}))
    chance = 100 * metrics["finetune/shapes/miou_chance"]
    assert f"shapes: chance {chance:.2f} % (every pixel of the most frequent class)" in said
    difference = f"shapes: pretrained minus random predictor {100 * (1 - below):+.2f} points"
    assert f"{difference} (95 %, over test images, one seed: +" in said


def test_a_difference_is_of_the_seeds_that_both_have(pictures):
    predicted, classes = pictures
    ours, control = (Family("predictor", start, ("shapes",)) for start in ("pretrained", "random"))
    good, bad = counts(classes, classes), counts(predicted, classes)
    found = summarise({ours: {0: good, 1: bad}, control: {0: bad}}, "abcd", "shapes", ("linear_head",))
    metrics, below = found["metrics"], miou(bad, np.ones(7), np.array([True, True, True, False]))
    assert metrics["finetune/shapes/linear_head/miou"] == pytest.approx((1 + below) / 2)
    assert metrics["finetune/shapes/linear_head/miou_difference"] == pytest.approx(1 - below)


def test_seeds_that_disagree_widen_the_intervals(pictures):
    predicted, classes = pictures
    ours, control = (Family("predictor", start, ("shapes",)) for start in ("pretrained", "random"))
    good, bad = counts(classes, classes), counts(predicted, classes)
    both = {ours: {0: good, 1: good, 2: bad}, control: {0: bad, 1: bad, 2: bad}}
    found = summarise(both, "abcd", "shapes")
    values = [1 - miou(bad, np.ones(7), np.array([True, True, True, False]))] * 2 + [0]
    low, high = repetitions_interval(values)
    assert high > 1 and found["metrics"]["finetune/shapes/miou_difference_high"] == 1
    assert found["metrics"]["finetune/shapes/miou_difference_low"] == pytest.approx(low)
    assert not any("one seed" in line for line in lines(found | {"efficiency": []}))


def test_a_class_of_one_image_does_not_raise_the_mean_where_it_is_not_drawn():
    """Nine images of a class that is always found, and one of a class that never is: half, in any resample."""
    found = np.zeros((10, 3, 2), np.int64)
    found[:9, :, 0] = 8
    found[9, 1, 0] = 1
    found[9, 2, 1] = 1
    summary = summarise({Family("encoder", "none", ("shapes",)): {0: found}}, "ab", "shapes")
    metrics = summary["metrics"]
    assert metrics["finetune/shapes/encoder/miou_high"] <= 0.5
    assert metrics["finetune/shapes/encoder/miou"] == pytest.approx(0.5, abs=0.01)
    assert [row["high"] for row in summary["classes"]] == [1, 0]


def test_where_the_class_is_not_drawn_its_iou_is_that_of_all_images(pictures):
    predicted, classes = pictures
    classes[0, 0, 0] = 3
    predicted[0, 0, :2] = 3
    weights = np.array([0.0, 1, 1, 1, 1, 1, 2])
    found, drawn = counts(predicted, classes), slice(1, None)
    assert class_iou(found, weights)[3] == class_iou(found, np.ones(7))[3] == 0.5
    np.testing.assert_allclose(class_iou(found, weights)[:3], class_iou(found[drawn], weights[drawn])[:3])
