"""The arms of a finetuning: one training each, with its result in a file, so that a finished one is not run again."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from iwm_ray.errors import RunError
from iwm_ray.finetuning.model import Start
from iwm_ray.finetuning.settings import RANDOM_ACTION, TARGETS, FinetuneConfig, Tune
from iwm_ray.run_directory import write_json

TUNES: tuple[Tune, ...] = get_args(Tune)
Taken = TypeVar("Taken")


@dataclass(frozen=True)
class Arm:
    """One training: what is tuned from where, for which tasks."""

    tune: Tune
    start: Start
    """of the predictor"""
    tasks: tuple[str, ...]
    seed: int
    lr: float
    is_choice: bool = False
    """whether it trains without the held-out images and is judged on them: it only helps to choose a rate"""

    @property
    def name(self) -> str:
        """Names its files."""
        words = [self.tune, self.start, "+".join(self.tasks), f"lr{self.lr:g}", f"seed{self.seed}"]
        return "-".join(words + ["choice"] * self.is_choice)

    @property
    def family(self) -> "Family":
        """What its repetitions with other seeds share."""
        return Family(self.tune, self.start, self.tasks)


@dataclass(frozen=True)
class Family:
    """Arms that differ in seed and learning rate only."""

    tune: Tune
    start: Start
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class ArmResult:
    """What an arm gave."""

    correct: dict[str, str]
    """task -> a `1` for each test image that was classified rightly, else `0`, in the order of the test split"""
    steps: int
    num_images: int
    loss: float
    trained_parameters: int
    images_per_second: float
    """of training; where tokens are cached, without the encoder's one pass"""
    peak_memory: int
    """bytes, see Fitted"""
    inputs: str
    """tokens or images"""
    encoder_hash: str
    """weights of the encoder after the training"""
    head_hash: str
    """weights of the heads before it"""

    def rights(self, task: str) -> NDArray[np.float64]:
        """`[k]` 1 for right, 0 for wrong."""
        return np.array([float(letter) for letter in self.correct[task]])


def families(config: FinetuneConfig, tasks: tuple[str, ...]) -> Iterator[Family]:
    """All families: every part to tune with its control, for all tasks together and for each alone."""
    groups = [tasks] if len(tasks) == 1 or not config.single_tasks else [tasks, *((task,) for task in tasks)]
    for tune in config.tune:
        starts: tuple[Start, ...] = ("none",) if tune == "encoder" else ("pretrained", "random")
        for group in groups:
            for start in starts:
                yield Family(tune, start, group)


def by_family(results: Mapping[Arm, ArmResult]) -> dict[Family, dict[int, ArmResult]]:
    """Seed -> result, of every family."""
    found: dict[Family, dict[int, ArmResult]] = {}
    for arm, result in results.items():
        found.setdefault(arm.family, {})[arm.seed] = result
    return found


def figure_name(family: Family, task: str, figure: str, ways: tuple[str, ...]) -> str:
    """`finetune/<task>/<figure>`, `finetune/<task>/multitask/both/linear_head/<figure>_random_predictor` ...

    Args:
        family: what was tuned from where.
        task: on which it was judged.
        figure: such as top1.
        ways: see TuningConfig.
    """
    words = ["finetune", task] + ["multitask"] * (len(family.tasks) > 1)
    words += [family.tune] * (family.tune != "predictor")
    if family.tune == "encoder":
        ways = tuple(way for way in ways if not way.startswith((RANDOM_ACTION, TARGETS)))
    return "/".join([*words, *ways, figure]) + "_random_predictor" * (family.start == "random")


def read_result(folder: Path, arm: Arm) -> ArmResult | None:
    """The result of a finished arm.

    Raises:
        RunError: its file is damaged.
    """
    path = folder / f"{arm.name}.json"
    return _result(path)[1] if path.exists() else None


def read_results(folder: Path) -> dict[Arm, ArmResult]:
    """The results of all arms that stand in a folder, whichever call has run them; those that only choose are left out.

    Raises:
        RunError: a file is damaged.
    """
    found = dict(map(_result, sorted(folder.glob("*.json"))))
    return {arm: result for arm, result in found.items() if not arm.is_choice}


def read_arm(path: Path) -> Arm:
    """Whose file it is.

    Raises:
        RunError: it is damaged.
    """
    return _read(path, lambda tree, arm: arm)


def _result(path: Path) -> tuple[Arm, ArmResult]:
    return _read(path, lambda tree, arm: (arm, ArmResult(**tree["result"])))


def _read(path: Path, take: Callable[[dict[str, Any], Arm], Taken]) -> Taken:
    try:
        tree = json.loads(path.read_text())
        return take(tree, Arm(**tree["arm"] | {"tasks": tuple(tree["arm"]["tasks"])}))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged ({error}); remove it, and the arm is run again") from None


def write_result(
    folder: Path, arm: Arm, result: ArmResult, settings: Mapping[str, Any], figures: Mapping[str, float]
) -> None:
    """Marks an arm as finished.

    Args:
        folder: of all arms.
        arm: names the file.
        result: of the arm.
        settings: by which it was trained (see TuningConfig.deciding).
        figures: its scores, by the names of the run's metrics.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"arm": asdict(arm), "settings": settings, "figures": figures, "result": asdict(result)}
    write_json(folder / f"{arm.name}.json", tree)


def read_figures(path: Path) -> dict[str, float]:
    """The scores in the file of a finished arm."""
    found: dict[str, float] = json.loads(path.read_text())["figures"]
    return found
