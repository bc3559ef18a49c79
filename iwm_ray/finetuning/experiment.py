"""A finetuning for classes of whole images: its data, cached tokens, networks and results."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iwm_ray.build import cache_folder
from iwm_ray.data.index import Index
from iwm_ray.data.quarantine import Quarantine
from iwm_ray.data.read import content_hash
from iwm_ray.errors import UsageError
from iwm_ray.evaluation.encoders import RunEncoder
from iwm_ray.evaluation.features import Features, model_device
from iwm_ray.evaluation.intervals import seeds_interval
from iwm_ray.finetuning import adapter
from iwm_ray.finetuning.arms import (
    TUNES,
    Arm,
    ArmResult,
    Family,
    families,
    figure_name,
    read_figures,
    read_result,
    read_results,
    write_result,
)
from iwm_ray.finetuning.classification import ClassObjective, measure
from iwm_ray.finetuning.data import (
    Extract,
    ImageRows,
    Images,
    Split,
    Steps,
    Task,
    TokenRows,
    Tokens,
    alternate,
    encode,
    note_missing,
    open_tasks,
)
from iwm_ray.finetuning.fit import Fitted
from iwm_ray.finetuning.model import Asking, Tuned, assemble, weights_hash
from iwm_ray.finetuning.settings import FinetuneConfig, TuningConfig
from iwm_ray.finetuning.tuning import Tuning, refuse_other_images, tokens_fit
from iwm_ray.trained import Trained
from iwm_ray.training.loop import autocast
from iwm_ray.views.resize import CLEAN_VIEW


@dataclass(frozen=True)
class Experiment(Tuning):
    """A finetuning, resolved."""

    config: FinetuneConfig
    tasks: dict[str, Task]
    extract: Extract = encode
    """how cached tokens are made: `encode` in this process, or what the runtime offers"""
    _tokens: dict[tuple[str, Index, bytes], Features] = field(default_factory=dict)
    """what has been extracted so far: by encoder, data set and choice of its samples"""

    @classmethod
    def open(
        cls, trained: Trained, config: FinetuneConfig, output: Path | None, extract: Extract = encode
    ) -> "Experiment":
        """Opens the data and checks what can be checked before anything is trained.

        Raises:
            UsageError: data or settings that don't fit.
        """
        if config.action == "random" and trained.config.predictor.conditioning == "none":
            raise UsageError(
                "--action random: the predictor of this run is told no action (predictor.conditioning none); leave it out"
            )
        cache = cache_of(trained, config)
        tasks = {task.name: task for task in open_tasks(config, trained.config, cache)}
        experiment = cls(trained, config, output or Path(), tasks, extract)
        folder = output or trained.run.path / "finetune" / experiment.name
        folder = folder.absolute()
        tasks = {name: _noting(task, folder / "quarantine") for name, task in tasks.items()}
        experiment = replace(experiment, folder=folder, tasks=tasks)
        experiment.check_batch(config.head == "linear")
        experiment.check_folder()
        return experiment

    @cached_property
    def name(self) -> str:
        parts = [part for task in self.tasks.values() for part in (task.train, task.test)]
        contents = [content_hash(part.index) for part in parts]
        # Of a training set that is smaller than it, the batch depends on the images that are held out.
        decides = [self.trained.hash, CLEAN_VIEW, str(self.batch_size), *self.tasks, *contents]
        return "+".join(self.tasks) + "-" + self.config.hash(*decides)

    def __getstate__(self) -> dict[str, Any]:
        """Tokens stay here: who gets a copy maps them himself."""
        return self.__dict__ | {"_tokens": {}}

    @property
    def families(self) -> list[Family]:
        return list(families(self.config, tuple(self.tasks)))

    @property
    def image_sets(self) -> dict[str, Images]:
        found: dict[str, Images] = {}
        for name, task in self.tasks.items():
            found |= {f"training images of {name}": task.train, f"test images of {name}": task.test}
        return found

    @property
    def batch_size(self) -> int:
        return min(self.config.batch_size, *(self._num_train(task) for task in self.tasks.values()))

    def _num_train(self, task: Task) -> int:
        """Images that every arm can train on: those that choose a rate leave out the held-out ones."""
        held = task.num_held_out(self.config.data.held_out) if self.config.chooses_rate else 0
        return len(task.train) - held

    def num_steps(self, tasks: tuple[str, ...]) -> list[int]:
        """Optimizer steps of each of these tasks: the same in company and alone."""
        config, own = self.config, []
        for task in self.tasks.values():
            an_epoch = len(task.train) // self.batch_size
            own.append(config.steps or max(1, round(config.epochs * an_epoch)))
        if config.data.weights:
            shares = np.array(config.data.weights) / sum(config.data.weights)
            own = [max(1, round(share * sum(own))) for share in shares]
        by_name = dict(zip(self.tasks, own, strict=True))
        return [by_name[name] for name in tasks]

    def num_steps_of(self, arm: Arm) -> int:
        return sum(self.num_steps(arm.tasks))

    def results(self) -> dict[Arm, ArmResult]:
        """Of all finished arms that were judged on the test set, whichever call has run them.

        Raises:
            RunError: a file is damaged, or they were judged on different images.
        """
        found, known = read_results(self.folder / "arms"), list(self.tasks)
        counts: dict[tuple[str, str], dict[Path, int]] = {}
        for arm, result in found.items():
            for task, correct in result.correct.items():
                path = self.folder / "arms" / f"{arm.name}.json"
                counts.setdefault((arm.tune, task), {})[path] = len(correct)
        for compared in counts.values():
            refuse_other_images(compared)

        def order(arm: Arm) -> tuple[Any, ...]:
            tasks = -len(arm.tasks), [known.index(task) for task in arm.tasks]
            return TUNES.index(arm.tune), *tasks, arm.start, arm.seed

        return {arm: found[arm] for arm in sorted(found, key=order)}

    def finished(self, arm: Arm) -> ArmResult | None:
        """An arm's result, if it has been run and its adapter, where one is due, is there."""
        if self.keeps(arm) and not adapter.exists(self.adapter(arm)):
            return None
        return read_result(self.folder / "arms", arm)

    def has_result(self, arm: Arm) -> bool:
        return self.finished(arm) is not None

    def score(self, arm: Arm) -> float:
        """Accuracy, the mean over the tasks."""
        result = self.finished(arm)
        assert result is not None
        return float(np.mean([result.rights(task).mean() for task in arm.tasks]))

    def assemble(self, arm: Arm) -> Tuned:
        counts = {name: len(self.tasks[name].class_names) for name in arm.tasks}
        model = self.trained.load()
        return assemble(self.trained, model, self.config, arm.tune, arm.start, counts, arm.seed)

    def objective(self, arm: Arm) -> ClassObjective:
        counts = tuple(len(self.tasks[name].class_names) for name in arm.tasks)
        schedule = alternate(self.num_steps(arm.tasks))
        return ClassObjective(
            arm.tasks, counts, schedule, self.batch_size, self.asking, self.config, arm.seed
        )

    def rows(self, arm: Arm) -> Steps:
        train, _ = self._splits(arm)
        schedule = alternate(self.num_steps(arm.tasks))
        mixes = self.config.augment.mixes and not self.has_tokens(arm)
        return Steps(tuple(train), schedule, self.batch_size, arm.seed, mixes)

    def has_tokens(self, arm: Arm) -> bool:
        return arm.tune == "predictor" and self._keeps_tokens()

    def prepare(self, arms: Sequence[Arm]) -> None:
        """Has the tokens extracted that these arms need."""
        for arm in arms:
            if self.has_tokens(arm):
                self._splits(arm)
        for task in self.tasks.values():
            for rows in (task.train, task.test):
                for (_, index, samples), found in self._tokens.items():
                    if (index, samples) == (rows.index, rows.samples.tobytes()):
                        note_missing(rows, found)

    def judge(self, arm: Arm, tuned: Tuned, fitted: Fitted) -> None:
        """Writes which images are classified rightly and, where it is kept, the adapter."""
        before, names = self.assemble(arm), arm.tasks
        _, judged = self._splits(arm)
        device, size = model_device(tuned), 2 * self.config.batch_size

        def cast() -> AbstractContextManager:
            return autocast(self.config.runtime, device)

        correct = {
            name: measure(tuned, name, split, self.asking, size, cast)
            for name, split in zip(names, judged, strict=True)
        }
        result = ArmResult(
            correct={name: "".join("01"[int(right)] for right in rights) for name, rights in correct.items()},
            steps=self.num_steps_of(arm),
            num_images=fitted.num_images,
            loss=fitted.loss,
            trained_parameters=tuned.num_trained,
            images_per_second=fitted.num_images / fitted.seconds,
            peak_memory=fitted.peak_memory,
            inputs="tokens" if self.has_tokens(arm) else "images",
            encoder_hash=weights_hash(tuned.encoder),
            head_hash=weights_hash(before.heads),
        )
        if self.keeps(arm):
            class_names = {name: self.tasks[name].class_names for name in names}
            encoder_hash = weights_hash(before.encoder)
            config = self.config
            if arm.tune == "encoder":  # there is no predictor that is told anything
                config = config.model_copy(update={"action": "null", "target_fraction": 1.0})
            adapter.save(self.adapter(arm), tuned, self.trained, config, class_names, encoder_hash)
        figures = _figures(arm, result, self.config.ways)
        write_result(self.folder / "arms", arm, result, self.config.deciding(), figures)

    def figures(self, arm: Arm) -> dict[str, float]:
        return read_figures(self.folder / "arms" / f"{arm.name}.json")

    def _splits(self, arm: Arm) -> tuple[list[Split], list[Split]]:
        """What the arm trains on and what it is judged on, for each of its tasks."""
        train: list[Split] = []
        judged: list[Split] = []
        for name in arm.tasks:
            task, count = self.tasks[name], len(self.tasks[name].train)
            kept = count - task.num_held_out(self.config.data.held_out) if arm.is_choice else count
            training = task.train.part(0, kept)
            measured = task.train.part(kept, count) if arm.is_choice else task.test
            if self.has_tokens(arm):
                train.append(self._cached(task.train, training, self.config.augment.flip_probability))
                judged.append(self._cached(task.train if arm.is_choice else task.test, measured, 0.0))
            else:
                train.append(replace(training, augment=self.config.augment))
                judged.append(measured)
        return train, judged

    def _keeps_tokens(self) -> bool:
        """Whether tokens can be computed once, and fit on the disk that is meant for them."""
        config = self.config
        if not config.augment.keeps_tokens:
            return False
        copies = 2 if config.augment.flip_probability else 1
        images = sum(copies * len(task.train) + len(task.test) for task in self.tasks.values())
        with torch.device("meta"):
            encoder = self.trained.untrained().encoder
        return tokens_fit(encoder, images, config.runtime)

    def _cached(self, whole: ImageRows, part: ImageRows, flip_probability: float) -> TokenRows:
        """Tokens of some rows of a split whose tokens are extracted whole, once."""
        flipped = self._features(whole, mirrored=True) if flip_probability else None
        tokens = Tokens(self._features(whole, mirrored=False), flipped)
        return TokenRows(part.samples, part.labels, tokens, flip_probability)

    def _features(self, rows: ImageRows, mirrored: bool) -> Features:
        encoder = RunEncoder(self.trained, self.config.encoder, for_predictor=True, mirrored=mirrored)
        key = (encoder.hash, rows.index, rows.samples.tobytes())
        if key not in self._tokens:
            self._tokens[key] = self.extract(encoder, rows)
        return self._tokens[key]

    @property
    def asking(self) -> Asking:
        """What predictors are asked for."""
        run, config = self.trained.config, self.config
        positions = run.grid[0] * run.grid[1]
        return Asking(self.trained.policy, positions, config.action == "random", config.target_fraction)


def _noting(task: Task, folder: Path) -> Task:
    """The task; of its images those that cannot be decoded are noted in files of this folder."""
    train, test = (Quarantine(folder / f"{task.name}-{part}.jsonl") for part in ("train", "test"))
    return replace(
        task, train=replace(task.train, quarantine=train), test=replace(task.test, quarantine=test)
    )


def cache_of(trained: Trained, config: TuningConfig) -> Path:
    """Where data indices and tokens are kept: as the run did, unless told otherwise."""
    given = config.runtime.cache
    return Path(given).expanduser().absolute() if given else cache_folder(trained.config)


def _figures(arm: Arm, result: ArmResult, ways: tuple[str, ...]) -> dict[str, float]:
    """Accuracies with their 95 % intervals over the images that the arm was judged on."""
    figures: dict[str, float] = {}
    for task in arm.tasks:
        name = f"held_out/{task}/top1" if arm.is_choice else figure_name(arm.family, task, "top1", ways)
        found = seeds_interval(result.rights(task)[None])
        figures |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
    return figures
