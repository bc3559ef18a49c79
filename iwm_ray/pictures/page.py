"""The page of a run: one HTML file that holds its pictures and needs nothing else, no network either."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined

from iwm_ray.evaluation.mrr import MrrResult

_TIE = 1e-6  # of the MRR: a model that ignores actions has chance but for rounding


@dataclass(frozen=True)
class Picture:
    """An image file of the page."""

    png: bytes
    alt: str
    """what it shows, for those who cannot see it"""

    @property
    def uri(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"

    @property
    def width(self) -> int:
        return int.from_bytes(self.png[16:20], "big")  # PNG: the first chunk begins with width and height

    @property
    def height(self) -> int:
        return int.from_bytes(self.png[20:24], "big")


@dataclass(frozen=True)
class Section:
    """A heading, what to look for, and the pictures."""

    name: str
    """letters, digits and hyphens: the anchor"""
    title: str
    caption: str
    pictures: tuple[Picture, ...]
    table: tuple[tuple[str, ...], ...] = ()
    """rows of cells, the first one the heads; after the pictures"""


def build_page(
    title: str, headline: str, facts: Mapping[str, str], sections: Sequence[Section], config: str
) -> str:
    """The HTML text; every text given is escaped.

    Args:
        title: of the run.
        headline: the result in one sentence.
        facts: name -> value, the table at the top.
        sections: in order.
        config: the configuration as text, folded away at the end.
    """
    page = _ENVIRONMENT.from_string(_PAGE)
    return page.render(title=title, headline=headline, facts=facts, sections=sections, config=config)


def mrr_sentence(result: MrrResult) -> str:
    """The headline of a measurement: MRR with its interval beside chance, and what that means."""
    metrics = result.metrics
    value, low, chance = metrics["mrr/mrr"], metrics["mrr/mrr_low"], metrics["mrr/chance"]
    figures = (
        f"MRR {value:.3f} (95 % interval {low:.3f} to {metrics['mrr/mrr_high']:.3f}, chance {chance:.3f})"
    )
    if low <= chance + _TIE:
        return f"Nothing shows that this model knows what an action does: {figures}."
    return f"This model knows something of what an action does: {figures}, {value / chance:.1f} times chance."


_ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)

# The policy in the head makes a browser refuse whatever is not in this file. Cells break their lines, but not within an
# interval ("0.2 to 0.4").
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root { --ink: #222; --soft: #5c5c5c; --page: #fafafa; --sheet: #fff; --line: #d9d9d9; --link: #00609a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #a8a8a8; --page: #16181b; --sheet: #212429; --line: #3a3e45; --link: #7cc4f0; }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0 0 .4rem; }
a { color: var(--link); }
.headline { font-size: 1.15rem; margin: 0 0 1.2rem; max-width: 48rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0 0 1.2rem; font-size: .92rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
nav ol { columns: 2 18rem; margin: 0; padding-left: 1.4rem; }
nav, section, details { border-top: 1px solid var(--line); padding-top: 1.2rem; margin-top: 1.6rem; }
.caption { margin: 0 0 .9rem; max-width: 48rem; }
.sheet { overflow-x: auto; margin: 0 0 1rem; background: #fff; border: 1px solid var(--line); border-radius: .4rem; }
.sheet:focus-visible { outline: 3px solid var(--link); }
.sheet img { display: block; width: 100%; height: auto; margin: 0 auto; max-width: calc(var(--natural) / 1.5);
  min-width: calc(var(--natural) / 2.3); }
.rows { overflow-x: auto; }
.rows:focus-visible { outline: 3px solid var(--link); }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); }
pre { background: var(--sheet); border: 1px solid var(--line); border-radius: .4rem; padding: 1rem; overflow-x: auto;
  font-size: .82rem; }
summary { cursor: pointer; font-weight: 600; }
.hint { display: none; color: var(--soft); font-size: .85rem; margin: 0 0 .4rem; }
@media (max-width: 46rem) {
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; }
  .hint { display: block; }
}
@media print {
  body { max-width: none; padding: 0; }
  .sheet, .rows { overflow: visible; }
  .sheet { border: 0; break-inside: avoid; }
  .sheet img { min-width: 0; max-width: 100%; }
  table { font-size: .6rem; }
  th, td { padding-right: .4rem; }
  tr { break-inside: avoid; }
  .hint { display: none; }
}
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="headline">{{ headline }}</p>
<dl>
{% for name, value in facts.items() %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
</header>
<nav aria-label="Contents">
<h2>Contents</h2>
<ol>
{% for section in sections %}
<li><a href="#{{ section.name }}">{{ section.title }}</a></li>
{% endfor %}
<li><a href="#configuration">Configuration</a></li>
</ol>
</nav>
<main>
{% for section in sections %}
<section id="{{ section.name }}">
<h2>{{ section.title }}</h2>
<p class="caption">{{ section.caption }}</p>
{% if section.pictures %}
<p class="hint">Swipe the picture sideways to see all of it.</p>
{% endif %}
{% for picture in section.pictures %}
<div class="sheet" tabindex="0" role="group" aria-label="{{ section.title }}, picture {{ loop.index }}">
<img src="{{ picture.uri }}" width="{{ picture.width }}" height="{{ picture.height }}" alt="{{ picture.alt }}"
 style="--natural: {{ picture.width }}px">
</div>
{% endfor %}
{% if section.table %}
<div class="rows" tabindex="0" role="group" aria-label="{{ section.title }}, table">
<table>
<thead>
<tr>{% for cell in section.table[0] %}<th scope="col">{{ cell | replace(" %", "\u00a0%") }}</th>{% endfor %}</tr>
</thead>
<tbody>
{% for row in section.table[1:] %}
<tr>{% for cell in row %}<td>{{ cell | replace(" to ", "\u00a0to\u00a0") }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
</section>
{% endfor %}
<details id="configuration">
<summary>Configuration</summary>
<pre>{{ config }}</pre>
</details>
</main>
</body>
</html>
"""
