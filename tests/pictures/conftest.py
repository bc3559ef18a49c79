from itertools import combinations

import pytest
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text


def _written(figure: Figure) -> list[Text]:
    """Every text that a reader sees; ticks beyond an axis' limits are not drawn."""
    unseen = set()
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        along = 0 if axis.axis_name == "x" else 1
        labels = axis.get_ticklabels(which="both")
        unseen |= {label for label in labels if not low <= label.get_position()[along] <= high}
        if not axis.axes.axison:
            unseen |= {*labels, axis.label}
    return [
        text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in unseen
    ]


class Page:
    """A figure as it is drawn: its texts, and where they lie."""

    def __init__(self, figure: Figure) -> None:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        self.width, self.height = canvas.get_width_height()
        self.boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in _written(figure)]
        self.texts = [text for text, _ in self.boxes]

    def overlaps(self) -> list[tuple[str, str]]:
        """Pairs of texts that share more than a pixel in both directions."""
        return [
            (a, b)
            for (a, first), (b, second) in combinations(self.boxes, 2)
            if min(first.x1, second.x1) - max(first.x0, second.x0) > 1
            and min(first.y1, second.y1) - max(first.y0, second.y0) > 1
        ]

    def cut_off(self) -> list[str]:
        """Texts that leave the page."""
        return [
            text
            for text, box in self.boxes
            if box.x0 < 0 or box.y0 < 0 or box.x1 > self.width or box.y1 > self.height
        ]


@pytest.fixture
def legible():
    """Checks that a figure can be read, and returns its texts."""

    def check(figure: Figure) -> list[str]:
        page = Page(figure)
        assert page.overlaps() == []
        assert page.cut_off() == []
        assert page.width <= 2000
        return page.texts

    return check
