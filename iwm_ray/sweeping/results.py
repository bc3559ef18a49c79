"""What the runs of a sweep found, read from their directories alone: configurations, relations, effects.

The unit is the configuration: its seeds are repetitions. A figure of a configuration is the mean over its seeds. Its
interval holds over seeds and test images: with three seeds or more it is theirs (Student's t), but never narrower than
that over test images alone (the mean of the seeds' intervals). Where a measurement takes a part of the images (MRR),
each seed chooses its own; where it takes all of them (probes, unless told otherwise), and in finetuning, every seed is
judged by the same ones, whose chance the seeds' spread does not hold.
"""

import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from iwm_ray import randomness
from iwm_ray.config import Config
from iwm_ray.errors import UsageError
from iwm_ray.evaluation.intervals import repetitions_interval
from iwm_ray.evaluation.settings import TaskName
from iwm_ray.recipes import RECIPES
from iwm_ray.run_directory import read_config
from iwm_ray.sweeping.record import SweepDirectory, read_json
from iwm_ray.sweeping.space import SEED, Point, short_words, words

MRR = "mrr/mrr"
FEWEST = 6
"""configurations of which a rank correlation is told; of five without any, the interval leaves out 0 one time in ten"""
FEWEST_SEEDS = 3
"""repetitions of which an interval is told; of two, Student's t is thirteen standard errors wide"""
_RESAMPLES = 2000
BEGUN, NOT_FINISHED = "begun", "not finished"
"""status and health line of a run without a summary"""
TRAINED = "trained"
"""status of a trial whose training has finished, and not yet all else that its sweep asks of it"""
_MARKS: dict[str, str] = {"mrr": "mrr/num_views", "knn": "knn/top1_low"}
"""task -> what it alone writes, where the end of a training writes figures of the same names, of fewer images"""


@dataclass(frozen=True)
class Outcome:
    """What MRR is compared with."""

    metric: str
    """a `*` stands for the name of any finetuning task; several are averaged"""
    title: str
    words: str
    """in a sentence"""
    unit: str = "%"
    paper: float | None = None
    """its correlation with MRR over the paper's configurations (IWM, section 5); None: not reported as a number"""


LINEAR = Outcome("linear/top1", "Linear probe", "the linear probe", paper=-0.85)
ATTENTIVE = Outcome("attentive/top1", "Attentive probe", "the attentive probe")
TUNED = Outcome("finetune/*/top1", "Predictor finetuned", "the finetuned predictor", paper=0.93)
GAIN = Outcome(
    "finetune/*/difference",
    "Finetuned − random predictor",
    "the gain of a finetuned predictor over a random one",
    "points",
)
BOTH = Outcome("finetune/*/both/top1", "End to end", "end-to-end finetuning")
KNN = Outcome("knn/top1", "kNN", "the kNN probe")
OUTCOMES = (LINEAR, ATTENTIVE, GAIN, TUNED, BOTH, KNN)


@dataclass(frozen=True)
class Result:
    """A trial's run directory, read."""

    path: Path
    config: Config
    point: Point
    status: str
    """finished, trained, stopped, failed, or begun where there is no summary yet"""
    health: str
    health_line: str
    metrics: Mapping[str, float]

    def figure(self, metric: str) -> float:
        """A metric; NaN where it was not measured."""
        if "*" not in metric:
            return float(self.metrics.get(metric, math.nan))
        pattern = _pattern(metric)
        found = [value for name, value in self.metrics.items() if pattern.fullmatch(name)]
        return float(np.mean(found)) if found else math.nan

    @property
    def tasks(self) -> list[str]:
        """What an evaluation has measured: the figures that a training ends with do not count."""
        return [
            task
            for task in get_args(TaskName)
            if any(name.startswith(_MARKS.get(task, task)) for name in self.metrics)
        ]

    @property
    def is_measured(self) -> bool:
        """Whether there is more than what a training ends with."""
        return bool(self.tasks) or any(name.startswith("finetune/") for name in self.metrics)


@dataclass(frozen=True)
class Configuration:
    """The trials that differ in nothing but the seed."""

    point: Point
    """without the seed"""
    results: tuple[Result, ...]

    @property
    def title(self) -> str:
        return short_words(self.point)

    @property
    def first(self) -> Result:
        """Of the first seed that has an MRR; where none has, of the first."""
        return next((each for each in self.results if not math.isnan(each.figure(MRR))), self.results[0])

    @property
    def is_above_chance(self) -> bool:
        """Whether the interval of its MRR leaves out chance."""
        return self.interval(MRR)[0] > self.mean("mrr/chance")

    def by_seed(self, metric: str) -> dict[int, float]:
        """Seed -> figure, of those that have it."""
        found = {result.config.seed: result.figure(metric) for result in self.results}
        return {seed: value for seed, value in found.items() if not math.isnan(value)}

    def seeds(self, metric: str) -> list[float]:
        """The figure of each seed that has it."""
        found = [result.figure(metric) for result in self.results]
        return [value for value in found if not math.isnan(value)]

    def mean(self, metric: str) -> float:
        """Over the seeds; NaN where none has it."""
        found = self.seeds(metric)
        return float(np.mean(found)) if found else math.nan

    def interval(self, metric: str) -> tuple[float, float]:
        """95 % over seeds and test images; of fewer than FEWEST_SEEDS over test images alone."""
        low, high = self.mean(f"{metric}_low"), self.mean(f"{metric}_high")
        found = self.seeds(metric)
        if len(found) < FEWEST_SEEDS:
            return low, high
        below, above = repetitions_interval(found)
        return float(np.fmin(low, below)), float(np.fmax(high, above))


@dataclass(frozen=True)
class Relation:
    """A rank correlation of MRR with an outcome, over configurations."""

    outcome: Outcome
    value: float
    low: float
    high: float
    """95 % of the bootstrap over configurations"""
    count: int
    """configurations that have both figures; below FEWEST the rest is NaN"""

    @property
    def is_known(self) -> bool:
        return self.count >= FEWEST and not math.isnan(self.value)

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.is_known and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Effect:
    """What an axis does to a metric: its figures with each value, over the same settings of all other axes."""

    axis: str
    metric: str
    values: dict[str, list[float]]
    """value of the axis -> figures of its configurations"""
    is_fair: bool
    """False where no setting of the other axes has every value: the configurations differ in other axes too"""
    low: float
    high: float
    """95 % of the reach, paired over the other axes and the seeds, for all pairs of values of all axes at once; NaN: there
    are too few pairs"""

    @property
    def means(self) -> dict[str, float]:
        return {name: float(np.mean(found)) for name, found in self.values.items()}

    @property
    def ends(self) -> tuple[str, str]:
        """The values with the smallest and the largest mean."""
        return min(self.means, key=self.means.__getitem__), max(self.means, key=self.means.__getitem__)

    @property
    def reach(self) -> float:
        """Largest mean minus smallest."""
        smallest, largest = self.ends
        return self.means[largest] - self.means[smallest]

    @property
    def is_known(self) -> bool:
        return not math.isnan(self.low)

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.is_known and self.low > 0


def read_results(folder: Path) -> list[Result]:
    """The runs of a sweep's folder, or of any folder whose subfolders are run directories.

    Raises:
        UsageError: there are none.
    """
    directory = SweepDirectory(folder)
    paths = directory.runs() or sorted(path.parent for path in folder.glob("*/config.json"))
    if not paths:
        raise UsageError(
            f"--report {folder}: no trials there; give the folder of a sweep, or one of run directories"
        )
    known = directory.points()
    found = [_result(path, read_config(path)) for path in paths]
    unfinished = {name for name in known if not directory.is_done(name)}
    found = [
        replace(each, status=TRAINED) if each.status == "finished" and each.path.name in unfinished else each
        for each in found
    ]
    return in_grid_order(found, known)


def in_grid_order(results: Sequence[Result], known: Mapping[str, Point]) -> list[Result]:
    """The results with their points, as the sweep's record has them; without a complete record, with points by the
    settings in which they differ. What they cannot be compared by is left out.

    Args:
        results: with any points, in folders that are named by the trials' hashes.
        known: hash -> point, in the order of the grid.
    """
    place = {name: number for number, name in enumerate(known)}
    ordered = sorted(results, key=lambda each: (place.get(each.path.name, len(place)), each.path.name))
    if all(result.path.name in known for result in ordered):
        points = [known[result.path.name] for result in ordered]
    else:
        points = _points([result.config for result in ordered])
    return _comparable([replace(result, point=point) for result, point in zip(ordered, points, strict=True)])


def _comparable(results: Sequence[Result]) -> list[Result]:
    """Without what is another figure of the same name: the kNN of the monitor, on few images and without an interval;
    finetunings that only some of the tuned trials have, since a mean over other tasks is another one; and the MRR that a
    training ends with, on few images and in smaller banks, unless all there are is of this kind and its trial is done."""
    is_evaluated = any("mrr" in result.tasks for result in results)
    tasks = Counter(task for result in results for task in _tasks(result))
    shared = [task for task, count in tasks.items() if count == max(tasks.values())]

    def kept(result: Result) -> dict[str, float]:
        known = result.tasks
        has_mrr = "mrr" in known or not (is_evaluated or result.status == TRAINED)
        return {
            name: value
            for name, value in result.metrics.items()
            if (has_mrr or not name.startswith("mrr/"))
            and ("knn" in known or not name.startswith(KNN.metric))
            and (not name.startswith("finetune/") or name.split("/")[1] in shared)
        }

    return [replace(each, metrics=kept(each)) for each in results]


def _tasks(result: Result) -> set[str]:
    """What a trial was finetuned for, and is judged by."""
    judged = [_pattern(outcome.metric) for outcome in OUTCOMES if outcome.metric.startswith("finetune/")]
    return {name.split("/")[1] for name in result.metrics if any(each.fullmatch(name) for each in judged)}


def compared(results: Sequence[Result]) -> list[str]:
    """The metrics by which trials are compared, MRR first: all that any of them has; before there are any, the probes."""
    if not results:
        return [MRR, LINEAR.metric, ATTENTIVE.metric]
    known = dict.fromkeys(name for result in results for name in sorted(result.metrics))
    wanted = [_pattern(outcome.metric) for outcome in OUTCOMES if outcome is not KNN]
    return [MRR, *(name for pattern in wanted for name in known if pattern.fullmatch(name))]


def configurations(results: Sequence[Result]) -> list[Configuration]:
    """Trials with their repetitions together, in the order of the grid."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(words(_without_seed(result.point)), []).append(result)
    return [
        Configuration(_without_seed(group[0].point), tuple(sorted(group, key=lambda each: each.config.seed)))
        for group in found.values()
    ]


def by_mrr(groups: Sequence[Configuration]) -> list[Configuration]:
    """By rising MRR; those without one come last."""
    return sorted(groups, key=lambda each: (math.isnan(each.mean(MRR)), each.mean(MRR)))


def relation(groups: Sequence[Configuration], outcome: Outcome) -> Relation:
    """Spearman's rank correlation with its bootstrap interval."""
    pairs = np.array([(group.mean(MRR), group.mean(outcome.metric)) for group in groups]).reshape(-1, 2)
    pairs = pairs[~np.isnan(pairs).any(1)]
    count = len(pairs)
    if count < FEWEST:
        return Relation(outcome, math.nan, math.nan, math.nan, count)
    resampled = [
        spearman(*pairs[(uniform * count).astype(int)].T)
        for uniform in (
            randomness.uniforms(0, 0, np.array([number]), "relation", count)[0]
            for number in range(_RESAMPLES)
        )
    ]
    # A resample that holds one value alone has no order to compare.
    ordered = [value for value in resampled if not math.isnan(value)] or [math.nan]
    low, high = np.quantile(ordered, (0.025, 0.975))
    return Relation(outcome, spearman(*pairs.T), float(low), float(high), count)


def spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Correlation of the ranks, ties at their average rank; NaN where either is constant."""
    one, other = (_ranks(values) - (len(values) + 1) / 2 for values in (x, y))
    scale = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / scale if scale > 0 else math.nan


def effects(groups: Sequence[Configuration], metric: str) -> list[Effect]:
    """Of every axis with several values; the one that moves the metric most comes first."""
    measured = [group for group in groups if not math.isnan(group.mean(metric))]
    axes = axes_of(measured)
    pairs = sum(math.comb(len({group.point.get(axis, "") for group in measured}), 2) for axis in axes)
    found = [_effect(measured, axis, metric, pairs) for axis in axes]
    return sorted(found, key=lambda effect: -effect.reach)


def _effect(groups: Sequence[Configuration], axis: str, metric: str, pairs: int) -> Effect:
    settings: dict[frozenset[tuple[str, str]], dict[str, Configuration]] = {}
    for group in groups:
        others = frozenset(item for item in group.point.items() if item[0] != axis)
        settings.setdefault(others, {})[group.point.get(axis, "")] = group
    names = in_order(list(dict.fromkeys(group.point.get(axis, "") for group in groups)))
    # Of an unfinished grid the rest would mix the effects of the other axes, or of the seeds, into this one's.
    whole = [row for row in settings.values() if len(row) == len(names) and _shared_seeds(row, metric)]
    levels = [_levels(row, metric) for row in whole or settings.values()]
    values = {name: [float(np.mean(level[name])) for level in levels if name in level] for name in names}
    effect = Effect(axis, metric, values, bool(whole), math.nan, math.nan)
    smallest, largest = effect.ends
    paired = levels if whole else []
    differences = [
        more - less for level in paired for less, more in zip(level[smallest], level[largest], strict=True)
    ]
    if len(differences) < FEWEST_SEEDS:
        return effect
    low, high = repetitions_interval(differences, pairs)
    return replace(effect, low=low, high=high)


def _shared_seeds(row: Mapping[str, Configuration], metric: str) -> list[int]:
    """The seeds that all configurations of a row have."""
    return sorted(set.intersection(*(set(group.by_seed(metric)) for group in row.values())))


def _levels(row: Mapping[str, Configuration], metric: str) -> dict[str, list[float]]:
    """The figures of each configuration, of the seeds that all have; of its own where they share none."""
    found = {name: group.by_seed(metric) for name, group in row.items()}
    shared = _shared_seeds(row, metric)
    return {name: [each[seed] for seed in shared or each] for name, each in found.items()}


def axes_of(groups: Sequence[Configuration]) -> list[str]:
    """The axes in which the configurations differ."""
    names = dict.fromkeys(axis for group in groups for axis in group.point)
    return [axis for axis in names if len({group.point.get(axis) for group in groups}) > 1]


def in_order(values: Sequence[str]) -> list[str]:
    """Numbers by size, words as they come."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return list(values)


def sound(groups: Sequence[Configuration]) -> list[Configuration]:
    """Those with an MRR of which no seed has collapsed."""
    return [
        group
        for group in groups
        if not math.isnan(group.mean(MRR)) and all(result.health != "collapsed" for result in group.results)
    ]


def span(groups: Sequence[Configuration]) -> tuple[Configuration, ...]:
    """The sound configurations with the lowest and the highest MRR; none where there are fewer than two."""
    found = by_mrr(sound(groups))
    return (found[0], found[-1]) if len(found) > 1 else ()


def named_points(groups: Sequence[Configuration]) -> dict[str, Configuration]:
    """The ends of the map, of the sound configurations: `equivariant` (highest MRR), none where that is not above chance,
    and `invariant` (lowest MRR), where that is at chance."""
    found = span(groups)
    if not found or not found[-1].is_above_chance:
        return {}
    named = dict(zip(ENDS, found, strict=True))
    return {end: group for end, group in named.items() if end == "equivariant" or not group.is_above_chance}


def measured(groups: Sequence[Configuration], fewest: int) -> list[Outcome]:
    """The outcomes that as many configurations have, one at least."""
    return [
        outcome
        for outcome in OUTCOMES
        if sum(not math.isnan(group.mean(outcome.metric)) for group in groups) >= max(1, fewest)
    ]


ENDS = ("invariant", "equivariant")
_BEST = {"best-linear": LINEAR.metric, "best-attentive": ATTENTIVE.metric, "best-finetuned": TUNED.metric}


def dial(groups: Sequence[Configuration], want: str | float) -> tuple[Configuration, str]:
    """The known configuration that is nearest to a wish.

    Args:
        groups: what is known.
        want: an MRR, or one of best-linear, best-attentive, best-finetuned, invariant, equivariant.

    Returns:
        the configuration, and the metric by which it was chosen.

    Raises:
        UsageError: nothing of the kind has been measured, or no configuration is above chance.
    """
    found = sound(groups)
    if isinstance(want, float):
        if found:
            return min(found, key=lambda group: abs(group.mean(MRR) - want)), MRR
    elif want in _BEST:
        known = [group for group in found if not math.isnan(group.mean(_BEST[want]))]
        if known:
            return max(known, key=lambda group: group.mean(_BEST[want])), _BEST[want]
    elif want in (named := named_points(groups)):
        return named[want], MRR
    raise UsageError(_why_unknown(groups, want))


def _why_unknown(groups: Sequence[Configuration], want: str | float) -> str:
    """Why the dial knows nothing near a wish, and what helps."""
    option = f"--want-mrr {want:g}" if isinstance(want, float) else f"--want {want}"
    finished = [each for group in groups for each in group.results if each.status == "finished"]
    if not finished:
        return f"{option}: no trial is finished; finish the sweep first"
    if not sound(groups):
        return (
            f"{option}: no sound configuration has an MRR; the health of every trial in the report says why"
        )
    if want == "invariant" and named_points(groups):
        return f"{option}: the lowest MRR is above chance, so no model here is invariant; add predictor.conditioning none"
    if want in ENDS and span(groups):
        return f"{option}: the highest MRR is not above chance, so the map has no ends; train longer"
    if want in ENDS:
        return f"{option}: one configuration with an MRR makes no map; finish the sweep, or add values to an axis"
    if want == "best-finetuned":
        return (
            f"{option}: no predictor was finetuned; the sweep's command with --finetune.tune predictor (without "
            "--no-finetune) adds it, and trains nothing again"
        )
    task = str(want).removeprefix("best-")
    known = {name for each in finished for name in each.tasks} | {task}
    tasks = " ".join(name for name in get_args(TaskName) if name in known)
    return (
        f"{option}: {task} was not measured; the sweep's command with --measure.tasks {tasks} adds it, and trains nothing "
        "again"
    )


def pretrain_command(config: Config) -> str:
    """The command line that trains a configuration with a recipe of this version."""
    recipe = RECIPES.get(config.recipe)
    if recipe is None:
        return "python -m iwm_ray.pretrain --config config.json"
    usual, options = recipe().flat(), []
    for name, value in config.flat().items():
        if value == usual[name] or name.startswith(("runtime.", "tracking.")):
            continue
        options += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(["python", "-m", "iwm_ray.pretrain", config.recipe, *options])


def table(results: Sequence[Result]) -> tuple[list[str], list[dict[str, Any]]]:
    """Axes, and one row a trial: hash, axes, seed, status, health, and every figure of the report with its interval."""
    axes = list(dict.fromkeys(axis for result in results for axis in result.point if axis != SEED))
    names = [MRR, "mrr/chance", "mrr/adjusted", "mrr/zero_action", "mrr/shuffled_action"]
    names += [outcome.metric for outcome in OUTCOMES] + [f"{TUNED.metric}_random_predictor", "rank/rankme"]
    with_ends = [name + end for name in names for end in ("", "_low", "_high")]
    measured = [name for name in with_ends if any(not math.isnan(result.figure(name)) for result in results)]
    rows = [
        {"trial": result.config.hash()}
        | {axis: result.point.get(axis, "") for axis in axes}
        | {"seed": result.config.seed, "status": result.status, "health": result.health}
        | {name.replace("*/", ""): result.figure(name) for name in measured}
        for result in results
    ]
    return axes, rows


def _pattern(metric: str) -> re.Pattern[str]:
    return re.compile(re.escape(metric).replace(r"\*", "[^/]+"))


def _result(path: Path, config: Config) -> Result:
    summary = read_json(path / "summary.json")
    metrics = {name: value for name, value in summary.get("metrics", {}).items() if value is not None}
    return Result(
        path,
        config,
        {},
        summary.get("status", BEGUN),
        summary.get("health", ""),
        summary.get("health_line", NOT_FINISHED),
        metrics,
    )


def _points(configs: Sequence[Config]) -> list[Point]:
    """Points by the settings in which the configurations differ."""
    flats = [config.flat() for config in configs]
    differing = [
        name
        for name in flats[0]
        if name.split(".")[0] not in ("runtime", "tracking", "recipe")
        and any(flat[name] != flats[0][name] for flat in flats)
    ]
    return [{name: str(flat[name]) for name in differing} for flat in flats]


def _without_seed(point: Point) -> Point:
    return {axis: value for axis, value in point.items() if axis != SEED}


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 1, ties at their average."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray(((2 * last - counts + 1) / 2)[inverse], np.float64)
