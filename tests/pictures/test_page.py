import base64
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from PIL import Image

from iwm_ray.pictures.page import Picture, Section, build_page, mrr_sentence

EVIL = """<script>alert("1")</script> & 'quotes'"""


def png(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "png")
    return file.getvalue()


class Elements(HTMLParser):
    """The elements of a page and its visible text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page():
    sections = [
        Section("first", f"One {EVIL}", f"Caption {EVIL}", (Picture(png(30, 20), f"alt {EVIL}"),)),
        Section("second", "Two", "Other", (Picture(png(5, 6), "a"), Picture(png(7, 8), "b"))),
    ]
    return build_page(
        f"Run {EVIL}", f"Headline {EVIL}", {f"name {EVIL}": f"value {EVIL}"}, sections, f"config {EVIL}"
    )


def test_every_text_is_escaped(page):
    assert "<script" not in page
    found = Elements(page)
    for word in ("Run", "Headline", "name", "value", "One", "Caption", "config"):
        assert f"{word} {EVIL}" in found.text
    assert next(attributes["alt"] for tag, attributes in found.elements if tag == "img") == f"alt {EVIL}"
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)


def test_the_pictures_are_in_the_page_with_their_sizes(page):
    images = [attributes for tag, attributes in Elements(page).elements if tag == "img"]
    sizes = []
    for attributes in images:
        data = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"))
        sizes.append(Image.open(io.BytesIO(data)).size)
        assert attributes["alt"]
        assert (int(attributes["width"]), int(attributes["height"])) == sizes[-1]
    assert sizes == [(30, 20), (5, 6), (7, 8)]


def test_nothing_is_loaded_from_elsewhere(page):
    for _, attributes in Elements(page).elements:
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert not re.search(r"url\(|@import|https?://", page)
    assert "default-src 'none'" in page


def test_the_contents_lead_to_the_sections(page):
    elements = Elements(page).elements
    targets = [attributes["href"][1:] for tag, attributes in elements if tag == "a"]
    assert targets == ["first", "second", "configuration"]
    assert set(targets) <= {attributes.get("id") for _, attributes in elements}


def test_light_dark_and_narrow_screens_are_thought_of(page):
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert '<html lang="en">' in page


@pytest.mark.parametrize(
    ("value", "low", "high", "words"),
    [
        (0.4, 0.3, 0.5, "4.0 times chance"),
        (0.1, 0.1, 0.1, "Nothing shows"),
        (0.12, 0.08, 0.2, "Nothing shows"),
    ],
)
def test_the_headline_says_what_the_interval_allows(value, low, high, words):
    names = ("mrr/mrr", "mrr/mrr_low", "mrr/mrr_high", "mrr/chance")
    result = SimpleNamespace(metrics=dict(zip(names, (value, low, high, 0.1), strict=True)))
    sentence = mrr_sentence(result)
    assert words in sentence
    assert f"MRR {value:.3f} (95 % interval {low:.3f} to {high:.3f}, chance 0.100)" in sentence
