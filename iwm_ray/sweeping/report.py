"""The report of a sweep: tables, figures and one page, from the run directories alone."""

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from matplotlib.figure import Figure

from iwm_ray.pictures.page import Picture, Section, build_page
from iwm_ray.pictures.spectrum import (
    Bar,
    Dot,
    EffectPanel,
    Key,
    Panel,
    Row,
    correlation_bars,
    effect_grid,
    heat_maps,
    spectrum_map,
)
from iwm_ray.run_directory import RunDirectory, write_json
from iwm_ray.sweeping.record import SweepDirectory, planned, read_json
from iwm_ray.sweeping.results import (
    FEWEST,
    GAIN,
    MRR,
    Configuration,
    Effect,
    Outcome,
    Result,
    axes_of,
    by_mrr,
    configurations,
    dial,
    effects,
    in_order,
    measured,
    named_points,
    pretrain_command,
    read_results,
    sound,
    span,
    table,
)
from iwm_ray.sweeping.space import Point, short_names, short_words
from iwm_ray.sweeping.words import effect_words, figure, reading, relations
from iwm_ray.wording import counted


@dataclass(frozen=True)
class Report:
    """What a folder of runs says."""

    folder: Path
    title: str
    question: str
    results: list[Result]
    failures: dict[str, dict[str, str]]
    """hash -> title and reason of trials that failed last"""
    planned: dict[str, Point]
    """hash -> point of the trials that are to be run, begun or not"""

    @classmethod
    def open(cls, folder: Path) -> "Report":
        """Reads a sweep's folder, or one of run directories.

        Raises:
            UsageError: there are no runs.
        """
        directory = SweepDirectory(folder.absolute())
        results = read_results(directory.path)
        found = read_json(directory.definition)
        title, question = f"Sweep {found.get('name', directory.path.name)}", found.get("question", "")
        return cls(directory.path, title, question, results, directory.failures(), planned(found))

    @cached_property
    def groups(self) -> list[Configuration]:
        return configurations(self.results)

    @cached_property
    def waiting(self) -> dict[str, Point]:
        """Hash -> point of the planned trials that have not begun, or failed before they did."""
        begun = {result.path.name for result in self.results}
        return {name: point for name, point in self.planned.items() if name not in begun}

    @cached_property
    def text(self) -> list[str]:
        """The results in sentences."""
        return reading(self.results, self.groups, len(self.waiting))

    def write(self) -> Path:
        """Writes SWEEP/report/: report.html, PNGs, trials.csv, trials.parquet, failures.json; returns the page."""
        place = SweepDirectory(self.folder).report
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / "failures.json", self.failures)
        rows = pa.Table.from_pylist(table(self.results)[1])
        pa.csv.write_csv(rows, place / "trials.csv")
        pa.parquet.write_table(rows, place / "trials.parquet")
        pictures = {name: _png(drawn) for name, drawn in self._figures().items()}
        for name, png in pictures.items():
            (place / f"{name}.png").write_bytes(png)
        page = place / "report.html"
        page.write_text(self._page(pictures))
        return page

    def wanted(self, want: str | float) -> list[str]:
        """The dial: the known configuration nearest to a wish, and the command that trains it."""
        group, metric = dial(self.groups, want)
        value = figure(group.mean(metric), group.interval(metric))
        seeds = ", ".join(figure(each) for each in group.seeds(metric))
        known, beyond = [each.mean(MRR) for each in span(self.groups)], ""
        if isinstance(want, float) and known and not known[0] <= want <= known[1]:
            beyond = f"; the known range is {figure(known[0])} to {figure(known[1])}"
        wish = f"nearest to MRR {want:g}" if isinstance(want, float) else want
        return [
            f"{wish}, of {counted(len(sound(self.groups)), 'known configuration')}: {group.title}{beyond}",
            f"  {metric} {value}, 95 %; by seed {seeds}",
            f"  {pretrain_command(group.results[0].config)}",
        ]

    def figures(self) -> dict[str, float]:
        """The few numbers of the whole sweep: `sweep/finished`, `sweep/failed`, `spectrum/lowest_mrr`,
        `spectrum/highest_mrr`, and `spectrum/rank_correlation/<metric>`."""
        found = {
            "sweep/finished": float(sum(result.status == "finished" for result in self.results)),
            "sweep/failed": float(len(self.failures)),
        }
        if ends := span(self.groups):
            found["spectrum/lowest_mrr"], found["spectrum/highest_mrr"] = (each.mean(MRR) for each in ends)
        for each in relations(self.groups):
            if each.is_known:
                found[f"spectrum/rank_correlation/{each.outcome.metric.replace('*/', '')}"] = each.value
        return found

    def markdown(self) -> list[str]:
        """The table of the configurations, as Markdown."""
        head, *rows = ([cell.replace("|", "/") for cell in row] for row in self._configuration_table())
        return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]

    # Figures

    def _figures(self) -> dict[str, Figure]:
        found = sound(self.groups)
        if not found:
            return {}
        drawn: dict[str, Figure] = {}
        if shown := measured(found, min(FEWEST, len(found))):
            drawn["map"] = self._map(shown)
            drawn["correlations"] = correlation_bars(
                [
                    Bar(each.outcome.title, each.value, each.low, each.high, each.outcome.paper, each.count)
                    for each in relations(self.groups)
                ]
            )
        if axes_of(found):
            drawn["effects"] = self._effects(shown)
        if len(axes_of(found)) > 1:
            drawn["heat"] = self._heat()
        return drawn

    def _map(self, shown: Sequence[Outcome]) -> Figure:
        groups = sound(self.groups)
        axes = [effect.axis for effect in effects(groups, MRR)]
        short = short_names(axes)
        color, marker, fill = (*axes, "", "", "")[:3]
        names = {id(group): name for name, group in named_points(self.groups).items()}
        by_metric = {each.outcome.metric: each for each in relations(self.groups)}
        panels = []
        for outcome in shown:
            dots = tuple(
                Dot(
                    group.mean(MRR),
                    group.mean(outcome.metric),
                    group.interval(MRR),
                    group.interval(outcome.metric),
                    tuple(
                        (result.figure(MRR), result.figure(outcome.metric))
                        for result in group.results
                        if len(group.results) > 1
                    ),
                    group.point.get(color, ""),
                    group.point.get(marker, ""),
                    group.point.get(fill, ""),
                    names.get(id(group), ""),
                )
                for group in groups
                if not math.isnan(group.mean(outcome.metric))
            )
            known = by_metric[outcome.metric]
            note = (
                f"rank correlation {known.value:+.2f} ({known.low:+.2f} to {known.high:+.2f})".replace(
                    "-", "−"
                )
                if known.is_known
                else "too few configurations for a correlation"
            )
            panels.append(Panel(outcome.title, note, dots, outcome is GAIN))
        keys = [Key(short.get(axis, ""), tuple(self._values(axis))) for axis in (color, marker, fill)]
        return spectrum_map(panels, groups[0].mean("mrr/chance"), *keys)

    def _effects(self, shown: Sequence[Outcome]) -> Figure:
        groups = sound(self.groups)
        wanted = {MRR: ("MRR", "")} | {
            each.metric: (_SHORT.get(each.title, each.title), each.unit) for each in shown
        }
        axes = [effect.axis for effect in effects(groups, MRR)]
        rows = []
        for metric, (title, unit) in wanted.items():
            found = {effect.axis: effect for effect in effects(groups, metric)}
            rows.append(Row(title, tuple(_panel(found.get(axis), bool(unit)) for axis in axes), unit))
        return effect_grid(list(short_names(axes).values()), rows)

    def _heat(self) -> Figure:
        """The two axes that move MRR most; a third one, where there is one, gives the tables."""
        groups = sound(self.groups)
        first, second, *others = [effect.axis for effect in effects(groups, MRR)]
        third = others[0] if others else ""
        short = short_names([first, second, *others])
        rows, columns = self._values(first), self._values(second)
        tables = {}
        for value in self._values(third) if third else [""]:
            cells = np.full((len(rows), len(columns)), np.nan)
            for row, column in np.ndindex(*cells.shape):
                found = [
                    group.mean(MRR)
                    for group in groups
                    if (group.point.get(first, ""), group.point.get(second, ""))
                    == (rows[row], columns[column])
                    and (not third or group.point.get(third, "") == value)
                ]
                cells[row, column] = np.mean(found) if found else np.nan
            tables[f"{short.get(third, '')} {value}".strip()] = cells
        return heat_maps(tables, rows, columns, (short[first], short[second]))

    def _values(self, axis: str) -> list[str]:
        if not axis:
            return []
        return in_order(list(dict.fromkeys(result.point.get(axis, "") for result in self.results)))

    # Page

    def _page(self, pictures: dict[str, bytes]) -> str:
        sections = [Section("reading", "What the figures say", "", (), points=tuple(self.text[2:]))]
        sections += [
            Section(name, title, caption, (Picture(pictures[name], caption),))
            for name, title, caption in self._captions()
            if name in pictures
        ]
        if ends := tuple(self._retrieval()):
            caption = " ".join([_RETRIEVAL_CAPTION, *(picture.alt for picture in ends)])
            sections.append(Section("retrieval", "Retrieval at the ends", caption, ends))
        sections += [
            Section("configurations", "Configurations", _TABLE_CAPTION, (), self._configuration_table()),
            Section("health", "Health of every trial", _HEALTH_CAPTION, (), self._health_table()),
        ]
        config = json.dumps(self.results[0].config.model_dump(mode="json"), indent=1)
        return build_page(self.title, " ".join(self.text[:2]), self._facts(), sections, config)

    def _retrieval(self) -> Iterator[Picture]:
        """The retrieval pictures that the named points' runs have drawn."""
        for name, group in named_points(self.groups).items():
            shown = group.first
            file = RunDirectory(shown.path).pictures / "retrieval.png"
            if file.exists():
                ends = (shown.figure(f"{MRR}_low"), shown.figure(f"{MRR}_high"))
                yield Picture(
                    file.read_bytes(),
                    f"The {name} end: seed {shown.config.seed} of {group.title}; MRR of this model "
                    f"{figure(shown.figure(MRR), ends)}.",
                )

    def _facts(self) -> dict[str, str]:
        facts = {"question": self.question} if self.question else {}
        facts["images"] = self.results[0].config.data.path
        for name, group in named_points(self.groups).items():
            facts[name] = f"{group.title}: MRR {figure(group.mean(MRR), group.interval(MRR))}"
            facts[f"{name}, command"] = pretrain_command(group.results[0].config)
        if self.failures:
            facts["failed"] = "; ".join(
                f"{each['title']}: {each['reason']}" for each in self.failures.values()
            )
        return facts

    def _captions(self) -> list[tuple[str, str, str]]:
        return [
            ("map", "The map: MRR against what the features are good for", _MAP_CAPTION),
            ("correlations", "Rank correlations beside the paper's", _RELATIONS_CAPTION),
            ("effects", "What each axis does", _EFFECTS_CAPTION),
            ("heat", "MRR over the axes", _HEAT_CAPTION),
        ]

    def _configuration_table(self) -> tuple[tuple[str, ...], ...]:
        shown = measured(self.groups, 1)
        axes = axes_of(self.groups)
        figures = (f"{each.title}, {each.unit} (95 %)" for each in shown)
        head = (*short_names(axes).values(), "seeds", "MRR (95 %)", *figures, "MRR by seed")
        rows = [
            (
                *(group.point.get(axis, "") for axis in axes),
                str(len(group.results)),
                figure(group.mean(MRR), group.interval(MRR)),
                *(figure(group.mean(each.metric), group.interval(each.metric), True) for each in shown),
                ", ".join(figure(value) for value in group.seeds(MRR)),
            )
            for group in by_mrr(self.groups)
        ]
        return (head, *rows)

    def _health_table(self) -> tuple[tuple[str, ...], ...]:
        rows = {
            result.path.name: (result.point, result.path.name, result.status, result.health_line)
            for result in self.results
        }
        rows |= {name: (point, name, "not begun", "") for name, point in self.waiting.items()}
        for name, failure in self.failures.items():
            if name in rows:
                rows[name] = (*rows[name][:2], "failed", failure["reason"])
        told = ((short_words(point), *rest) for point, *rest in rows.values())
        return (("trial", "folder", "status", "health"), *told)


_SHORT = {GAIN.title: "Tuned − random"}
_RELATIONS_CAPTION = (
    "Spearman's rank correlation of MRR over configurations; 95 % intervals of a bootstrap over configurations. "
    "The paper's are over its own configurations on ImageNet (IWM, section 5)."
)
_RETRIEVAL_CAPTION = (
    "What each model takes for the target view, drawn at the end of its training from a few images: figures inside a "
    "picture are of these images alone; those here are of the table below."
)
_MAP_CAPTION = (
    "Each large mark is a configuration, the mean over its seeds; small ones are the seeds. Whiskers are 95 % intervals "
    "over seeds and test images; of configurations with fewer than three seeds, over test images alone. The dashed line "
    "is the MRR of guessing."
)
_EFFECTS_CAPTION = (
    "Small marks are configurations; the line joins the means, over all settings of the other axes that have every "
    "value. Above: the largest difference of two means, 95 %, paired over the other axes and the seeds, and for all pairs "
    "of values in the row at once; a bold one leaves out 0."
)
_HEAT_CAPTION = "MRR, mean over seeds and over the axes that are not shown."
_TABLE_CAPTION = (
    "By rising MRR; means over seeds, with intervals as on the map. One row a trial, with every figure: trials.csv, "
    "trials.parquet."
)
_HEALTH_CAPTION = (
    "Every trial that was planned, and what the monitors said at the end of training, or why it failed. A trial that has "
    "collapsed is not on the map."
)


def _panel(effect: Effect | None, is_percent: bool) -> EffectPanel:
    """What is drawn of an effect; nothing where too little has been measured."""
    if effect is None:
        return EffectPanel({}, "")
    note = effect_words(effect, is_percent) if effect.is_known else ""
    return EffectPanel(effect.values, note, effect.is_clear)


def _png(drawn: Figure) -> bytes:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png")
    return buffer.getvalue()
