"""A sweep as a value: a configuration, the axes along which it varies, and what is measured of every trial.

A trial is a resolved configuration; its hash is its name. So the same sweep given again finds what is done, and a grid
that has grown only adds trials.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, Self

from iwm_ray.cli import suggest, validate
from iwm_ray.config import Config
from iwm_ray.errors import UsageError
from iwm_ray.evaluation.settings import MeasureConfig
from iwm_ray.finetuning.settings import FinetuneConfig
from iwm_ray.recipes import RECIPES

Size = Literal["laptop", "cifar10", "imagenet"]
SIZES: dict[Size, str] = {
    "laptop": "photos_tiny",
    "cifar10": "cifar10_small",
    "imagenet": "vitb16_in1k_invariant",
}
"""size -> recipe that a sweep of this size varies"""

SEED = "seed"
QUICK = MeasureConfig(
    tasks=("mrr", "rank", "linear", "attentive"),
    untrained=False,
    images=256,
    targets=8,
    components=False,
    inverse=False,
)
"""what a trial is measured by unless its sweep says otherwise"""

Point = dict[str, str]
"""axis -> name of its value: what a person calls a trial"""


@dataclass(frozen=True)
class Axis:
    """A question's variable: names of values, each with the settings that it stands for."""

    name: str
    """a setting, or a word for several settings that change together"""
    values: Mapping[str, Mapping[str, Any]]
    """name of the value -> setting -> value"""

    @classmethod
    def of(cls, setting: str, *values: Any) -> Self:
        """The axis of one setting, such as `predictor.depth`."""
        return cls(setting, {str(value): {setting: value} for value in values})

    @property
    def settings(self) -> set[str]:
        """What its values set."""
        return {name for settings in self.values.values() for name in settings}

    def first(self) -> "Axis":
        """The axis with its first value alone."""
        return replace(self, values=dict([next(iter(self.values.items()))]))


@dataclass(frozen=True)
class Trial:
    """One configuration of a sweep."""

    config: Config
    point: Point

    @property
    def hash(self) -> str:
        """Its name, and that of its run directory."""
        return self.config.hash()

    @property
    def group(self) -> Point:
        """The point without the seed: trials of one group repeat each other."""
        return {axis: value for axis, value in self.point.items() if axis != SEED}

    @property
    def title(self) -> str:
        """`predictor.depth=4 seed=1`"""
        return words(self.point)

    @property
    def short_title(self) -> str:
        """`none, depth 4, seed 1`: fits a column of a table."""
        return short_words(self.point)


@dataclass(frozen=True)
class Sweep:
    """What is varied, and what is measured of every trial."""

    name: str
    question: str
    base: Config
    axes: tuple[Axis, ...]
    measure: MeasureConfig = QUICK
    finetune: FinetuneConfig | None = None
    """of the predictor, or end-to-end, with controls; on the trial's own data where `data.path` is empty; None: no
    finetuning"""

    @property
    def settings(self) -> set[str]:
        """What its axes set."""
        return {name for axis in self.axes for name in axis.settings}

    def trials(self) -> list[Trial]:
        """Every point of the grid, seed by seed: a sweep that is interrupted has the whole map once, not a part of it
        three times.

        Raises:
            UsageError: one line that names the first setting, value or pair of trials that is wrong.
        """
        self._check_axes()
        found: dict[str, Trial] = {}
        seeds_slowest = sorted(self.axes, key=lambda axis: axis.name != SEED)
        for names in product(*(axis.values for axis in seeds_slowest)):
            point = {axis.name: name for axis, name in zip(seeds_slowest, names, strict=True)}
            trial = self.trial({axis.name: point[axis.name] for axis in self.axes})
            if trial.hash in found:
                raise UsageError(
                    f"axes: {trial.title} and {found[trial.hash].title} are the same configuration; drop one"
                )
            found[trial.hash] = trial
        return list(found.values())

    def trial(self, point: Point) -> Trial:
        """The trial at a point of the grid.

        Raises:
            UsageError: its settings do not fit together.
        """
        tree = self.base.model_dump()
        for axis in self.axes:
            for setting, value in axis.values[point[axis.name]].items():
                _put(tree, setting, value)
        try:
            return Trial(validate(tree), point)
        except UsageError as error:
            raise UsageError(f"trial {words(point)}: {error}") from None

    def with_seeds(self, seeds: Sequence[int]) -> "Sweep":
        """The sweep with these seeds as its last axis."""
        axes = tuple(axis for axis in self.axes if axis.name != SEED)
        return replace(self, axes=(*axes, Axis.of(SEED, *seeds)))

    def smoke(self) -> "Sweep":
        """One trial, as small as the parts allow: does everything run?"""
        tree = self.base.model_dump()
        for setting, value in _SMOKE.items():
            _put(tree, setting, value)
        measure = self.measure.cheap().model_copy(
            update={"tasks": self.measure.tasks, "images": 16, "train_images": 200, "test_images": 100}
        )
        tuned = self.finetune
        if tuned is not None:
            data = tuned.data.model_copy(update={"num_train": 64, "num_test": 32})
            tuned = tuned.model_copy(update={"steps": 4, "batch_size": 16, "seeds": (0,), "data": data})
        axes = tuple(axis.first() for axis in self.axes)
        return replace(self, base=validate(tree), axes=axes, measure=measure, finetune=tuned)

    def _check_axes(self) -> None:
        known = list(self.base.flat())
        seen: set[str] = set()
        for axis in self.axes:
            if axis.name in seen:
                raise UsageError(f"axes: {axis.name} is given twice; join its values in one axis")
            seen.add(axis.name)
            if not axis.values:
                raise UsageError(f"axis {axis.name}: no values; give at least one")
            for setting in axis.settings:
                if setting not in known:
                    raise UsageError(
                        f"axis {axis.name}: unknown setting {setting!r}{suggest(setting, known)}; see pretrain --help"
                    )
                if setting.startswith(("runtime.", "tracking.")):
                    raise UsageError(
                        f"axis {axis.name}: {setting} cannot change results, so its values would be one trial; drop it"
                    )


def choose(trials: Sequence[Trial], count: int, seed: int) -> list[Trial]:
    """A random choice of trials; asked for more, it keeps those that it chose before."""
    shuffled = sorted(trials, key=lambda trial: trial.hash)
    random.Random(seed).shuffle(shuffled)  # noqa: S311
    return shuffled[:count]


def words(point: Mapping[str, str]) -> str:
    """`predictor.depth=4 seed=1`"""
    return " ".join(f"{axis}={value}" for axis, value in point.items()) or "the only configuration"


def short_words(point: Mapping[str, str]) -> str:
    """`none, depth 4, seed 1`"""
    named = zip(short_names(point).values(), point.values(), strict=True)
    shown = (value if value.isalpha() else f"{name} {value}" for name, value in named)
    return ", ".join(shown) or "the only configuration"


def short_names(axes: Iterable[str]) -> dict[str, str]:
    """Axis -> the last part of its name, where that is no other's: `predictor.depth` is `depth`."""
    axes = list(axes)
    last = [axis.rpartition(".")[2] for axis in axes]
    return {axis: name if last.count(name) == 1 else axis for axis, name in zip(axes, last, strict=True)}


def base(size: Size) -> Config:
    """The configuration that a sweep of this size varies; what is small runs without a TorchTrainer of its own."""
    config = RECIPES[SIZES[size]]()
    if size == "imagenet":
        return config
    here = config.runtime.model_copy(update={"engine": "local", "data_workers": 1})
    return config.model_copy(update={"runtime": here})


def finetuning(size: Size) -> FinetuneConfig | None:
    """Predictor and end-to-end finetuning, as far as a size can pay for it."""
    if size == "imagenet":
        return None  # days of one GPU a trial: `python -m iwm_ray.finetune` for the named points
    data = {"num_train": 2000, "num_test": 1000} if size == "cifar10" else {}
    return FinetuneConfig.model_validate({"tune": ("predictor", "both"), "epochs": 20, "data": data})


def _put(tree: dict[str, Any], setting: str, value: Any) -> None:
    *sections, name = setting.split(".")
    for section in sections:
        tree = tree[section]
    tree[name] = value


_SMOKE = {
    "encoder.width": 64,
    "encoder.depth": 2,
    "encoder.num_heads": 4,
    "predictor.width": 64,
    "predictor.depth": 2,
    "predictor.num_heads": 4,
    "optimizer.global_batch_size": 32,
    "schedule.steps": 12,
    "monitor.num_images": 32,
    "monitor.num_bank_images": 64,
    "monitor.mrr_images": 4,
    "monitor.mrr_views": 8,
}
