"""What all tunings share: arms, each a training of its own that workers can take up where another attempt left it."""

import glob
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from iwm_ray.config import flat
from iwm_ray.errors import RunError, UsageError
from iwm_ray.feed import Rows
from iwm_ray.finetuning.arms import Arm, Family
from iwm_ray.finetuning.data import Images
from iwm_ray.finetuning.fit import ArmRecord, Between, DivergedError, Fitted, Objective, TuneState, fit
from iwm_ray.finetuning.model import Tuned
from iwm_ray.finetuning.settings import PLACES, TuningConfig, TuningRuntimeConfig
from iwm_ray.loader import to_tensors
from iwm_ray.model.encoder import Encoder
from iwm_ray.run_directory import RunDirectory, write_json
from iwm_ray.trained import Trained
from iwm_ray.workers import OpenColumns, Outcome, Worker, begin, guarded, resume, shared

Train = Callable[[Sequence[Arm]], bool]
"""trains arms, whose results then are in the folder; False: it was stopped before the end"""

_CHOICE_SEED = 0  # one for all calls: an arm that is added later learns at the same rate


def tokens_fit(encoder: Encoder, num_images: int, runtime: TuningRuntimeConfig) -> bool:
    """Whether the tokens of so many images fit on the disk that is meant for them."""
    num_bytes = 2 * num_images * encoder.grid[0] * encoder.grid[1] * encoder.width
    return num_bytes <= runtime.token_gigabytes * 1e9


@dataclass(frozen=True)
class Tuning(ABC):
    """A finetuning or a segmentation, resolved: small enough to travel to every worker."""

    trained: Trained
    config: TuningConfig
    folder: Path
    """RUN/finetune/NAME"""

    @property
    @abstractmethod
    def name(self) -> str:
        """Names all that decides the results but the arm: checkpoint, data, settings."""

    @property
    @abstractmethod
    def families(self) -> list[Family]: ...

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Images of a step, over all workers."""

    @property
    @abstractmethod
    def image_sets(self) -> dict[str, Images]:
        """All sets of images, by what they are called: `training images of photos`."""

    @abstractmethod
    def num_steps_of(self, arm: Arm) -> int:
        """Optimizer steps of an arm."""

    @abstractmethod
    def assemble(self, arm: Arm) -> Tuned:
        """The network of an arm before its training, on the CPU."""

    @abstractmethod
    def objective(self, arm: Arm) -> Objective:
        """What an arm is trained for."""

    @abstractmethod
    def rows(self, arm: Arm) -> Rows:
        """What an arm is trained on."""

    @abstractmethod
    def has_tokens(self, arm: Arm) -> bool:
        """Whether an arm is trained on cached tokens, which each worker reads itself; else on images."""

    @abstractmethod
    def prepare(self, arms: Sequence[Arm]) -> None:
        """Makes what several arms use, such as cached tokens, before any of them starts."""

    @abstractmethod
    def judge(self, arm: Arm, tuned: Tuned, fitted: Fitted) -> None:
        """Measures a trained network, keeps it where it is to be kept, and marks the arm as finished."""

    @abstractmethod
    def has_result(self, arm: Arm) -> bool:
        """Whether an arm's result is there, with the tuned network where that is kept."""

    def is_finished(self, arm: Arm) -> bool:
        """Whether nothing is left to do for an arm."""
        return self.diverged(arm).exists() or self.has_result(arm)

    def diverged(self, arm: Arm) -> Path:
        """The note of a rate of the grid at which the loss was not finite: it has no result, and is not chosen."""
        return ArmTraining(self, arm).run.path / "diverged"

    def adapter(self, arm: Arm) -> Path:
        """Where the tuned network of an arm is kept, if it is."""
        return self.folder / "adapters" / arm.name

    def keeps(self, arm: Arm) -> bool:
        """Whether the tuned network is kept: of each family but controls, that of the seed which was run first."""
        if arm.start == "random" or arm.is_choice or arm.seed != self.config.seeds[0]:
            return False
        family = glob.escape(arm.name.removesuffix(str(arm.seed)))
        kept = {path.parent for path in (self.folder / "adapters").glob(f"{family}*/*.json")}
        return not kept - {self.adapter(arm)}

    @abstractmethod
    def figures(self, arm: Arm) -> dict[str, float]:
        """What a finished arm has scored, by the names of the run's metrics."""

    @abstractmethod
    def score(self, arm: Arm) -> float:
        """Of a finished arm, on what it was judged on: the higher, the better."""

    def record(self) -> dict[str, Any]:
        """What all arms of the folder share."""
        return {"name": self.name} | self.config.deciding()

    def start(self) -> None:
        """Records it in the folder; what an earlier call has written stays, for it is the same, but for images that could
        not be decoded then and can be now. Where all arms are finished these stay too: the arms had to do without them."""
        path = self.folder / "config.json"
        if not path.exists():
            write_json(path, self.record())
        forgets = self.has_left()
        for images in self.image_sets.values():
            if forgets and images.quarantine is not None:
                images.quarantine.forget_mended(images.index, images.limits)

    def num_undecodable(self) -> dict[str, int]:
        """How many images of each set could not be decoded so far: of training images only those that were read."""
        return {name: len(_noted(images)) for name, images in self.image_sets.items()}

    def undecodable_lines(self) -> list[str]:
        """One line for each set with images that could not be decoded."""
        return [_undecodable(name, images) for name, images in self.image_sets.items() if _noted(images)]

    def refuse_undecodable(self) -> None:
        """Raises RunError where a larger share of a set cannot be decoded than is allowed, as pretraining does."""
        share = self.config.data.max_bad_fraction
        if share is None:
            share = self.trained.config.data.max_bad_fraction
        for name, images in self.image_sets.items():
            if len(_noted(images)) > max(1, share * len(images.samples)):
                raise RunError(
                    f"{_undecodable(name, images)}; more than --data.max-bad-fraction {share:g} (of a sweep: "
                    "--finetune.max-bad-fraction): give a larger one to go on without them, or mend them and remove the "
                    f"arms that had to do without them from {self.folder / 'arms'}"
                )

    def check_folder(self) -> None:
        """Finds, before anything is created, why the folder can't be used.

        Raises:
            UsageError: it can't be made or written, or holds the arms of another tuning.
            RunError: its record is damaged.
        """
        RunDirectory(self.folder).check_place()
        path = self.folder / "config.json"
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text())
            name = found["name"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path}: damaged ({error}); choose another --output, or remove the file if the arms there are of these "
                "settings"
            ) from None
        if name != self.name:
            raise UsageError(
                f"--output {self.folder}: holds a tuning {_difference(found, self.record())}; choose another --output"
            )

    def run(self, train: Train) -> bool:
        """Trains and measures what is not finished; False: stopped before the end.

        First the arms that choose learning rates, on held-out training images, then those that are judged on the test
        set.
        """
        for arms in (self.candidates, self.finals):
            left = [arm for arm in arms() if not self.is_finished(arm)]
            if left:
                self.prepare(left)
                self.refuse_undecodable()
                if not train(left):
                    return False
        self.refuse_undecodable()  # of arms too that an earlier call has judged
        return True

    def has_left(self) -> bool:
        """Whether an arm is not finished."""
        return any(not self.is_finished(arm) for arms in (self.candidates, self.finals) for arm in arms())

    def refuse_unused(self) -> None:
        """Raises UsageError for settings of what is not tuned, but not in a folder that was begun: there another call may
        have tuned it."""
        if not (self.folder / "config.json").exists():
            self.config.refuse_unused()

    def candidates(self) -> list[Arm]:
        """The arms among whose learning rates the held-out images choose, of all families; none without a choice."""
        return [arm for family in self.families for arm in self._candidates(family)]

    def finals(self) -> list[Arm]:
        """The arms that are judged on the test set; their rates have been chosen."""
        return [
            Arm(family.tune, family.start, family.tasks, seed, self._rate(family))
            for family in self.families
            for seed in self.config.seeds
        ]

    def planned(self) -> list[Arm]:
        """Every arm of a fresh run; rates that are still to be chosen stand as the first of the grid."""
        return self.candidates() + [
            Arm(family.tune, family.start, family.tasks, seed, self.config.default_lr)
            for family in self.families
            for seed in self.config.seeds
        ]

    def _candidates(self, family: Family) -> list[Arm]:
        grid = self.config.lr_grid if self.config.chooses_rate else ()
        return [Arm(family.tune, family.start, family.tasks, _CHOICE_SEED, lr, True) for lr in grid]

    def _rate(self, family: Family) -> float:
        """The rate with the best score on held-out training images; the first of equals.

        Raises:
            RunError: the loss was finite at none.
        """
        candidates = self._candidates(family)
        if not candidates:
            return self.config.default_lr
        scores = [-np.inf if self.diverged(arm).exists() else self.score(arm) for arm in candidates]
        if max(scores) == -np.inf:
            rates = " ".join(f"{arm.lr:g}" for arm in candidates)
            raise RunError(
                f"--lr-grid {rates}: the loss of {family.tune}, {family.start} predictor, is finite at no rate; add lower "
                "ones"
            )
        return candidates[int(np.argmax(scores))].lr

    def num_images(self, arm: Arm) -> int:
        """Images that an arm trains on, counted as often as they are seen."""
        return self.num_steps_of(arm) * self.batch_size

    def check_batch(self, is_normalised: bool) -> None:
        """Checks that the batch can be shared.

        Args:
            is_normalised: whether a head normalises over the batch.

        Raises:
            UsageError: the workers can't share it, or it would be cut where it must be whole.
        """
        runtime = self.config.runtime
        if is_normalised and runtime.accumulation_steps > 1:
            raise UsageError(
                f"runtime.accumulation_steps {runtime.accumulation_steps}: the head normalises over the whole batch; set "
                "it to 1"
            )
        if self.batch_size % (runtime.num_workers * runtime.accumulation_steps):
            raise UsageError(
                f"--batch-size {self.batch_size}: is not divisible by runtime.num_workers {runtime.num_workers} x "
                f"runtime.accumulation_steps {runtime.accumulation_steps}; give a multiple of it, no larger than the "
                "training set"
            )


def refuse_other_images(counts: Mapping[Path, int]) -> None:
    """Checks that arms which are compared were judged on the same images.

    Args:
        counts: file of an arm -> how many images it was judged on.

    Raises:
        RunError: on fewer or more than the newest: images were mended or damaged in between.
    """
    if len(set(counts.values())) < 2:
        return
    newest = max(counts, key=lambda path: path.stat().st_mtime)
    others = sorted(path for path in counts if counts[path] != counts[newest])
    raise RunError(
        f"{others[0]}: judged on {counts[others[0]]} images, {newest.name} on {counts[newest]}, for some were mended or "
        f"damaged in between; remove {' '.join(path.name for path in others)} there to run them again, or choose another "
        "--output"
    )


def _noted(images: Images) -> list[dict[str, Any]]:
    return images.quarantine.records() if images.quarantine else []


def _undecodable(name: str, images: Images) -> str:
    """What is said of a set with images that cannot be decoded."""
    assert images.quarantine is not None
    found = _noted(images)
    return (
        f"{len(found)} of {len(images.samples)} {name} cannot be decoded, e.g. {found[0]['row_id']}: "
        f"{found[0]['reason']}; all are named in {images.quarantine.file}"
    )


def _difference(recorded: dict[str, Any], now: dict[str, Any]) -> str:
    """How the record of a folder differs from another: the first setting, and how many there are."""
    before, names = flat(recorded), []
    for name, value in flat(now).items():
        if name != "name" and before.get(name) != value:
            names.append(name)
    names.sort(key=lambda name: name.removeprefix("data.") in PLACES)  # the same images may lie elsewhere
    if not names:
        return "of another checkpoint or of other images, or of an earlier version of iwm_ray"
    first, more = names[0], f" (+{len(names) - 1} more)" if len(names) > 1 else ""
    return f"with other settings: {first} {before.get(first)!r} != {flat(now)[first]!r}{more}"


@dataclass(frozen=True)
class ArmTraining:
    """One arm, as workers train it."""

    tuning: Tuning
    arm: Arm

    @property
    def run(self) -> RunDirectory:
        """The arm's own folder; checkpoints are there until it is finished."""
        return RunDirectory(self.tuning.folder / "arms" / self.arm.name)

    @property
    def runtime(self) -> TuningRuntimeConfig:
        return self.tuning.config.runtime

    @property
    def batch_size(self) -> int:
        return self.tuning.batch_size

    @property
    def total_steps(self) -> int:
        return self.tuning.num_steps_of(self.arm)

    @cached_property
    def feed(self) -> Rows | None:
        """None: tokens lie on the disk, and each worker maps them."""
        return None if self.tuning.has_tokens(self.arm) else self.tuning.rows(self.arm)

    @property
    def data_processes(self) -> int:
        return self.runtime.data_workers


def work(training: ArmTraining, worker: Worker, open_columns: OpenColumns) -> Outcome:
    """Trains an arm from its newest valid checkpoint to the end; rank 0 alone writes, and measures at the end."""
    return guarded(training.run, worker, lambda: _work(training, worker, open_columns))


def _work(training: ArmTraining, worker: Worker, open_columns: OpenColumns) -> Outcome:
    tuning, arm, run = training.tuning, training.arm, training.run
    generation = begin(run, worker, training.runtime)
    tuned = tuning.assemble(arm).to(worker.device)
    record = ArmRecord(tuning=tuning.name, arm=arm.name)
    state = TuneState.start(tuned, tuning.config, arm.start, arm.lr, record, training.total_steps)
    found = resume(run, worker, state)
    if found:
        state.recall(found.state.extra)
    columns = (
        _own_columns(training, worker, state.step) if training.feed is None else open_columns(state.step)
    )
    batches = _checked(columns, training, worker, state.step)
    folder, refuse = RunDirectory(tuning.folder), tuning.refuse_undecodable
    between = Between(run, folder, worker, state, training.batch_size, generation, refuse)
    diverged = ""
    try:
        fit(
            state, batches, tuning.objective(arm), shared(tuned, worker, len(arm.tasks) == 1), worker, between
        )
    except DivergedError as error:
        if not arm.is_choice:
            raise
        diverged = str(error)  # one rate of several
    if not diverged and state.step < state.total_steps:
        return Outcome("stopped", state.step)
    if worker.rank == 0:
        if diverged:
            tuning.diverged(arm).write_text(diverged)
        else:
            tuning.judge(arm, tuned, between.fitted(state))
        shutil.rmtree(run.checkpoints)
    return Outcome("finished", state.step)


def _own_columns(training: ArmTraining, worker: Worker, start: int) -> Iterator[dict[str, Tensor]]:
    """This worker's share of each batch, read here."""
    rows, size = training.tuning.rows(training.arm), training.batch_size // worker.count
    for step in range(start, training.total_steps):
        first = step * training.batch_size + worker.rank * size
        yield to_tensors(rows.rows(np.arange(first, first + size)))


def _checked(
    columns: Iterator[dict[str, Tensor]], training: ArmTraining, worker: Worker, step: int
) -> Iterator[dict[str, Tensor]]:
    """Refuses rows that are not the ones of this step."""
    size = training.batch_size
    for part in columns:
        counters = part["counter"].unique()
        if counters.div(size, rounding_mode="floor").ne(step).any() or len(counters) != size // worker.count:
            raise RuntimeError(f"step {step} was handed the rows {counters.tolist()}")
        yield part
        step += 1
