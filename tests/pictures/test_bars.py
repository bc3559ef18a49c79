import pytest

from iwm_ray.pictures.bars import ErrorRow, action_r2_bars, error_curves, mrr_bars

COMPONENTS = ["brightness", "contrast", "saturation", "hue"]
TRAINED = {
    "mrr/mrr": 0.5,
    "mrr/mrr_low": 0.45,
    "mrr/mrr_high": 0.56,
    "mrr/chance": 0.07,
    "mrr/h1": 0.3,
    "mrr/brightness": 0.3,
    "mrr/brightness_low": 0.21,
    "mrr/brightness_high": 0.38,
    "mrr/hue": 0.2,
}
UNTRAINED = {"mrr/mrr": 0.071, "mrr/brightness": 0.069, "mrr/chance": 0.07}


def widths(figure):
    return [round(bar.get_width(), 3) for bar in figure.axes[0].patches if bar.get_width() > 0]


def test_bars_of_what_was_measured_beside_chance(legible):
    figure = mrr_bars(TRAINED, COMPONENTS, UNTRAINED)
    texts = legible(figure)
    assert [text for text in texts if text in ("all together", *COMPONENTS)] == [
        "all together",
        "brightness",
        "hue",
    ]
    assert {"0.500  [0.450, 0.560]", "0.300  [0.210, 0.380]", "0.200", "0.071", "0.069"} <= set(texts)
    assert {"trained", "untrained", "chance 0.07"} <= set(texts)
    assert widths(figure) == [0.5, 0.3, 0.2, 0.071, 0.069]


def test_whiskers_end_where_the_interval_does():
    lines = mrr_bars(TRAINED, COMPONENTS).axes[0].lines
    ends = [list(line.get_xdata()) for line in lines]
    assert ends == [[0.45, 0.56], [0.21, 0.38], [0.07, 0.07]]  # the last one is chance


def test_bars_at_chance_do_not_look_long():
    figure = mrr_bars({"mrr/mrr": 0.024, "mrr/chance": 0.024}, COMPONENTS)
    assert figure.axes[0].get_xlim()[1] >= 3 * 0.024


@pytest.mark.parametrize("value", [0.8, -0.3])
def test_action_r2_beside_guessing_the_mean(value, legible):
    figure = action_r2_bars({"action_r2/mean": 0.4, "action_r2/hue": value}, [*COMPONENTS, "grayscale"])
    texts = legible(figure)
    assert {"mean", "hue", f"{value:.3f}".replace("-", "−"), "always guessing the mean: 0"} <= set(texts)
    assert "blur" not in texts
    low, high = figure.axes[0].get_xlim()
    assert low <= value <= high


def test_error_curves_are_means_with_the_range_around(legible):
    rows = [
        ErrorRow(name, strength, error, 2 * error)
        for name in COMPONENTS
        for strength in (0.5, -0.5, 0.0)
        for error in (0.1, 0.3)
    ]
    figure = error_curves(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == COMPONENTS
    null, true = figure.axes[0].lines
    assert list(true.get_xdata()) == [-0.5, 0.0, 0.5]
    assert list(true.get_ydata()) == pytest.approx([0.2] * 3)
    assert list(null.get_ydata()) == pytest.approx([0.4] * 3)
    assert {tuple(axes.get_ylim()) for axes in figure.axes} == {(0, 0.6 * 1.05)}  # one scale, from zero
    assert {"true action", "null action"} <= set(legible(figure))


@pytest.mark.parametrize("components", [[], ["hue"], COMPONENTS])
def test_few_components_and_none_can_be_drawn(components, legible):
    legible(error_curves([ErrorRow(name, 0.1, 0.2, 0.3) for name in components]))
