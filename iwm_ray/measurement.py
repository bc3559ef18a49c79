"""Measures a trained model: each task with its own file of results, beside untrained weights and other encoders.

A result is kept under a key of everything that decides it; asking again for what is there costs nothing. What is slow
(banks of views, features) runs part by part on any number of workers (runtime/measure.py).
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from numpy.typing import NDArray

from iwm_ray.build import choose
from iwm_ray.config import RuntimeConfig
from iwm_ray.data.decode import DecodeLimits, Undecodable, decode
from iwm_ray.data.index import Index
from iwm_ray.data.read import Reader, content_hash
from iwm_ray.data.splits import refuse_shared_images, refuse_unknown_classes, refuse_unreadable
from iwm_ray.errors import RunError, UsageError
from iwm_ray.evaluation import probes
from iwm_ray.evaluation.action_regression import MIN_IMAGES, action_features, regress
from iwm_ray.evaluation.encoders import LAST, FrozenEncoder, RunEncoder, TimmEncoder
from iwm_ray.evaluation.features import Features, measuring
from iwm_ray.evaluation.intervals import named
from iwm_ray.evaluation.marginal import marginal_features
from iwm_ray.evaluation.mrr import rank_images, rank_rows, summarise
from iwm_ray.evaluation.prediction_error import Questions, error_rows, make_questions, prediction_errors
from iwm_ray.evaluation.probes import ProbeResult
from iwm_ray.evaluation.rank import lidar, rankme
from iwm_ray.evaluation.settings import (
    DECIDES,
    PROBES,
    REPRESENTATION,
    TASKS,
    WORLD_MODEL,
    MeasureConfig,
    TaskName,
)
from iwm_ray.model.iwm import IWM
from iwm_ray.run_directory import write_json
from iwm_ray.runtime.measure import Arrays, Progress, Work, extract, in_order, work_device
from iwm_ray.trained import Trained
from iwm_ray.training.loop import autocast, uses_bfloat16
from iwm_ray.views.resize import CLEAN_VIEW, clean_view

Metrics = dict[str, float]
Rows = dict[str, NDArray[Any]]
Found = tuple[dict[str, Metrics], dict[str, Rows], list[str]]
"""figures by subject, tables by name, numbers of images in words"""
ShowProgress = Callable[[str, str], Progress]
"""task and subject -> what is called as the work goes on"""

TRAINED, UNTRAINED = "trained", "untrained"
_IMAGES_AT_ONCE = 4  # banks of one part
_NUM_TRIED = 16  # images of each set that are read before anything begins
_HELD_OUT = 5  # one in five images of each class, where there are no test images
# Its number goes up when the same settings would give other figures, so that no kept result is taken.
VERSION = f"1 of {CLEAN_VIEW}"


@dataclass(frozen=True)
class TaskResult:
    """What a task found."""

    task: TaskName
    key: str
    """names all that decides it"""
    seconds: float
    settings: dict[str, Any]
    """`measure` of the evaluation"""
    images: str
    """on which images, in words"""
    measured: dict[str, Metrics]
    """subject (`trained`, `untrained`, an encoder's name) -> metric -> value"""
    version: str = ""
    """of the measuring code"""


@dataclass(frozen=True)
class Measurement:
    """What is measured, on which images, and where results are kept."""

    trained: Trained
    settings: MeasureConfig
    runtime: RuntimeConfig
    limits: DecodeLimits
    train: Index
    test: Index | None
    """None: a fifth of the training images are the test images"""
    folder: Path
    """RUN/evaluation/step_00000500"""
    show: ShowProgress = field(compare=False)

    def run(self, task: TaskName) -> TaskResult:
        """Measures a task, or reads its kept result; writes TASK.json and, where there are rows, TASK-*.parquet.

        Raises:
            UsageError: the images don't fit the task, or the folder can't be written.
            RunError: no image could be read, or a worker died again and again.
        """
        key = self._key(task)
        kept = read_result(self.folder / f"{task}.json")
        if kept is not None and kept.key == key:
            return kept
        begin = time.monotonic()
        if task == "marginal":
            measured, rows, counts = self._marginal()
        else:
            measured, rows, counts = (
                self._world_model(task) if task in WORLD_MODEL else self._representation(task)
            )
        # JSON has no NaN: the error's share where the null action errs nowhere, say.
        measured = {
            subject: {name: value for name, value in metrics.items() if math.isfinite(value)}
            for subject, metrics in measured.items()
        }
        settings, images = self.settings.model_dump(mode="json"), self._images(task, counts)
        result = TaskResult(task, key, time.monotonic() - begin, settings, images, measured, VERSION)
        self._write(result, rows)
        return result

    # What the figures are of

    @cached_property
    def encoders(self) -> dict[str, FrozenEncoder]:
        """Subject -> encoder: the target encoder first, then untrained weights, then what was asked for besides."""
        found: dict[str, FrozenEncoder] = {TRAINED: RunEncoder(self.trained)}
        if self.settings.untrained:
            found[UNTRAINED] = RunEncoder(self.trained, "untrained")
        for name in self.settings.encoders:
            found[name] = _encoder(self.trained, name)
        return found

    @property
    def _own(self) -> tuple[str, ...]:
        """The subjects that have a predictor."""
        return (TRAINED, UNTRAINED) if self.settings.untrained else (TRAINED,)

    def check(self, tasks: Sequence[TaskName]) -> None:
        """Finds what would make a task fail, before hours have gone into the ones ahead of it.

        Raises:
            UsageError: images that can't be read, no labels, one class, too few images, no such layer, views that don't
                differ, tasks that the model can't do.
        """
        self._check_readable()
        if self.test is not None:
            learned_from, tested_on = self._samples
            refuse_shared_images("data.test_path", self.train, learned_from, self.test, tested_on)
        if self.trained.config.predictor.target == "pixels":
            _refuse_world_model(tasks)
        if set(tasks) & set(PROBES):
            self._check_classes()
        if set(tasks) & set(REPRESENTATION) and self.settings.layers != (LAST,):
            depth = len(self.trained.untrained().encoder.vit.blocks)
            wrong = [layer for layer in self.settings.layers if not LAST <= layer < depth]
            if wrong:
                raise UsageError(
                    f"measure.layers {wrong[0]}: the encoder has layers 0 to {depth - 1}, and -1"
                )
        images = min(self.settings.images, len(self.test or self.train))
        if "action_r2" in tasks and images < MIN_IMAGES:
            raise UsageError(
                f"measure.images: action_r2 needs {MIN_IMAGES}, there are {images}; leave the task out"
            )
        if "mrr" in tasks and not any(each.scale for each in self.trained.policy.target_jitter.fields):
            raise UsageError(
                "measure.tasks mrr: this run has no colour jitter, all views are equal; leave mrr out"
            )

    def _check_readable(self) -> None:
        """Some images of each set: where none of a few can be read, the rest is hardly better."""
        for index, setting in ((self.train, "data.path"), (self.test, "data.test_path")):
            if index is None:
                continue
            tried = choose(self.trained.config.seed, index, min(_NUM_TRIED, len(index)), "tried")
            refuse_unreadable(setting, index, tried, self.limits)

    def _check_classes(self) -> None:
        for index, setting in ((self.train, "data.path"), (self.test or self.train, "data.test_path")):
            if not (index.labels >= 0).any():
                raise UsageError(
                    f"{setting}: no image has a label, and probes need them; give class folders, data.label_column, or "
                    f"--tasks {' '.join(task for task in TASKS if task not in PROBES)}"
                )
        if len(np.unique(self.train.labels[self.train.labels >= 0])) < 2:
            raise UsageError("data.path: all images are of one class; probes need two or more")
        learned_from, tested_on = self._samples
        if not ((self.test or self.train).labels[tested_on] >= 0).any():
            raise UsageError(
                f"data.path: one image in {_HELD_OUT} of each class is held out for the test, and no class has as many; "
                "give more images, or --data.test-path"
            )
        labelled, classes = (self.train.labels[learned_from] >= 0).sum(), len(self.train.class_names)
        if labelled < classes:
            raise UsageError(
                f"measure.train_images {self.settings.train_images}: {labelled} labelled training images are fewer than "
                f"the {classes} classes of data.path; take more of them"
            )
        if self.test:
            refuse_unknown_classes("data.test_path", self.train, self.test)

    @cached_property
    def _samples(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of the probes' training and test images; some of each class among the training images."""
        seed, settings = self.trained.config.seed, self.settings
        everything = choose(seed, self.train, len(self.train), "probe")
        place = _place_in_class(self.train.labels[everything])
        if self.test:
            test = choose(seed, self.test, settings.test_images or len(self.test), "probe test")
        else:
            sizes = np.bincount(self.train.labels + 1)[self.train.labels[everything] + 1]
            is_held = place < sizes // _HELD_OUT
            test = everything[is_held][: settings.test_images or None]
            everything, place = everything[~is_held], place[~is_held]
        if settings.train_images:
            # Every class has its first image before any has its second.
            everything = everything[np.argsort(place, kind="stable")][: settings.train_images]
        return everything, test

    def _images(self, task: TaskName, counts: list[str]) -> str:
        """In words, for the result."""
        asked = f"test images of {self.test.source}" if self.test else ""
        if task in WORLD_MODEL:
            return f"{', '.join(counts)} {asked or 'training images'}"
        return f"{', '.join(counts)} images; tested on {asked or 'a random fifth of the training images'}"

    def _key(self, task: TaskName) -> str:
        settings = self.settings.model_dump(include=set(DECIDES[task]))
        data = [content_hash(index) if index else "" for index in (self.train, self.test)]
        encoders = (
            {} if task not in REPRESENTATION else {name: each.hash for name, each in self.encoders.items()}
        )
        precision = uses_bfloat16(self.runtime, work_device(self.runtime))
        limits = asdict(self.limits)
        facts = [VERSION, task, self.trained.hash, settings, data, encoders, precision, limits]
        facts += [] if self.settings.untrained else [TRAINED]
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()

    # World model

    def _world_model(self, task: TaskName) -> Found:
        index = self.test or self.train
        samples = choose(self.trained.config.seed, index, self.settings.images, "evaluation")
        row_ids = np.array([index.row_id(int(sample)) for sample in samples])
        measured: dict[str, Metrics] = {}
        rows: dict[str, Rows] = {}
        for subject in self._own:
            table = self._ask(task, subject, index, samples)
            measured[subject], some_rows = self._summarise(task, table, row_ids)
            if some_rows:
                rows[subject] = some_rows
        unreadable = len(samples) - len(table["number"])
        return (
            measured,
            rows,
            [f"{len(table['number']):,}" + f" ({unreadable} unreadable)" * (unreadable > 0)],
        )

    def _ask(self, task: TaskName, subject: str, index: Index, samples: NDArray[np.int64]) -> Arrays:
        """The table of a task: what the model of this subject makes of each image, numbered by its place in `samples`."""
        numbers = np.arange(len(samples))
        parts = [
            (numbers[first : first + _IMAGES_AT_ONCE], samples[first : first + _IMAGES_AT_ONCE])
            for first in range(0, len(samples), _IMAGES_AT_ONCE)
        ]
        untrained = subject == UNTRAINED
        make = _AskModel(task, self.trained, untrained, index, self.settings, self.runtime, self.limits)
        with closing(in_order(make, parts, self.runtime, self.show(task, subject))) as found:
            return _joined(found)

    def _marginal(self) -> Found:
        """The linear probe on what the predictor expects of an image over many actions."""
        measured, counts = {}, []
        for subject in self._own:
            train, test = (
                self._expected(subject, index, samples)
                for index, samples in zip((self.train, self.test or self.train), self._samples, strict=True)
            )
            probe = probes.linear_probe(
                train, test, seed=self.trained.config.seed, device=work_device(self.runtime)
            )
            measured[subject] = {
                name.replace("linear/", "marginal/"): value for name, value in probe.metrics.items()
            }
            counts = [f"{_count(train)} training", f"{_count(test)} test"]
        return measured, {}, counts

    def _expected(self, subject: str, index: Index, samples: NDArray[np.int64]) -> Features:
        table = self._ask("marginal", subject, index, samples)
        found = samples[table["number"]]
        labels = index.labels[found].astype(np.int64)
        unreadable = len(samples) - len(found)
        return Features(table["features"], labels, found, index.class_names, "", unreadable)

    def _summarise(self, task: TaskName, table: Arrays, row_ids: NDArray[Any]) -> tuple[Metrics, Rows]:
        """Figures and rows of a joined table."""
        policy, seed = self.trained.policy, self.trained.config.seed
        if task == "mrr":
            ranks = rank_rows(table, policy, seed)
            figures = {"mrr/num_views": float(table["num_views"][0])} | summarise(table, seed)
            return figures, {"row_id": row_ids[ranks["image"]], **ranks}
        if task == "error":
            errors = error_rows(table, make_questions(policy), seed)
            return mean_errors(table, make_questions(policy), seed), errors
        metrics = regress(table, [field.name for field in policy.schema], seed)
        return metrics | {"rank/lidar": float(lidar(torch.from_numpy(table["target"])))}, {}

    # Representation

    def _representation(self, task: TaskName) -> Found:
        measured: dict[str, Metrics] = {}
        heads: list[dict[str, Any]] = []
        for subject, encoder in self.encoders.items():
            train, test = self._features(task, subject, encoder)
            metrics: Metrics = {}
            for layer in train:
                results = self._probe(task, subject, train[layer], test[layer])
                suffix = "" if layer == LAST else f"_layer{layer}"
                for result in results:
                    metrics |= {f"{name}{suffix}": value for name, value in result.metrics.items()}
                    heads += [{"encoder": subject, "layer": layer, **vars(head)} for head in result.heads]
            measured[subject] = metrics
            some_train, some_test = next(iter(train.values())), next(iter(test.values()))
        counts = [f"{_count(some_train)} training", f"{_count(some_test)} test"][task == "rank" :]
        return measured, {"heads": _columns(heads)} if heads else {}, counts

    def _features(
        self, task: TaskName, subject: str, encoder: FrozenEncoder
    ) -> tuple[dict[int, Features], dict[int, Features]]:
        layers = self.settings.layers if subject in (TRAINED, UNTRAINED, "context") else (LAST,)

        def features(index: Index, samples: NDArray[np.int64]) -> dict[int, Features]:
            return extract(
                encoder,
                index,
                samples,
                runtime=self.runtime,
                limits=self.limits,
                cache=Path(self.runtime.cache),
                pooled=task != "attentive",
                layers=layers,
                progress=self.show(f"{task}: features", subject),
            )

        train, test = self._samples
        tested = features(self.test or self.train, test)
        return (tested if task == "rank" else features(self.train, train)), tested

    def _probe(self, task: TaskName, subject: str, train: Features, test: Features) -> Sequence[ProbeResult]:
        device, seed = work_device(self.runtime), self.trained.config.seed
        progress = self.show(task, subject)
        if task == "linear":
            return [probes.linear_probe(train, test, seed=seed, device=device, progress=progress)]
        if task == "attentive":
            return [probes.attentive_probe(train, test, seed=seed, device=device, progress=progress)]
        if task == "knn":
            return [probes.knn_probe(train, test, num_neighbors=self.settings.num_neighbors, device=device)]
        if task == "lowshot":
            return [
                probes.low_shot_probe(
                    train, test, percent, num_subsets=self.settings.repeats, seed=seed, device=device
                )
                for percent in self.settings.low_shot
            ]
        return [_rank(test)]

    # Results

    def _write(self, result: TaskResult, rows: dict[str, Rows]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob(f"{result.task}-*.parquet"):
                stale.unlink()
            for name, columns in rows.items():
                file = self.folder / f"{result.task}-{name}.parquet"
                partial = file.with_name(f".{file.name}")
                pa.parquet.write_table(pa.table(columns), partial)
                partial.replace(file)
            write_json(self.folder / f"{result.task}.json", vars(result))
        except OSError as error:
            raise UsageError(f"{self.folder}: {error.strerror}; make it writable") from None


def _refuse_world_model(tasks: Sequence[TaskName]) -> None:
    """Raises UsageError for tasks that read the predictor, of a run whose predictor gives pixels."""
    wrong = [task for task in tasks if task in (*WORLD_MODEL, "marginal")]
    if wrong:
        raise UsageError(
            f"measure.tasks {' '.join(wrong)}: this run predicts pixels (MAE), not the tokens under an action that these "
            f"tasks compare; use --tasks {' '.join(REPRESENTATION)}"
        )


def kept_result(trained: Trained, task: TaskName) -> TaskResult | None:
    """What a whole (not a cheap) evaluation of this checkpoint has found; None where there was none of this version."""
    found = read_result(results_folder(trained) / f"{task}.json")
    return found if found and found.version == VERSION else None


def results_folder(trained: Trained, cheap: bool = False, data: str = "") -> Path:
    """Where the results of a checkpoint are kept; those of other data than the run's own under its hash."""
    name = trained.path.name + f"-{data}" * bool(data) + "-cheap" * cheap
    return trained.run.path / "evaluation" / name


def read_result(path: Path) -> TaskResult | None:
    """A kept result; None where there is none that can be read."""
    with suppress(OSError, ValueError, TypeError):
        return TaskResult(**json.loads(path.read_text()))
    return None


@dataclass(frozen=True)
class _AskModel:
    """What a worker needs to measure a world model; called, it gives the function from a part to rows of a table."""

    task: TaskName
    trained: Trained
    untrained: bool
    index: Index
    settings: MeasureConfig
    runtime: RuntimeConfig
    limits: DecodeLimits

    def __call__(self) -> Work:
        device, reader = work_device(self.runtime), Reader(self.index)
        model = (self.trained.untrained() if self.untrained else self.trained.load()).to(device)

        def measure(part: tuple[NDArray[np.int64], NDArray[np.int64]]) -> Arrays:
            numbers, images = self._read(reader, *part)
            if not len(images):
                return {}
            with measuring(model), autocast(self.runtime, device):
                return self._table(model, images, numbers)

        return measure

    def _table(self, model: IWM, images: NDArray[np.uint8], numbers: NDArray[np.int64]) -> Arrays:
        policy, seed, settings = self.trained.policy, self.trained.config.seed, self.settings
        if self.task == "error":
            return prediction_errors(model, policy, images, numbers, make_questions(policy))
        if self.task == "marginal":
            clean = torch.from_numpy(images).permute(0, 3, 1, 2)
            features = marginal_features(model, policy, clean, numbers, seed=seed)
            return {"number": numbers, "features": features.cpu().numpy()}
        if self.task == "action_r2":
            return action_features(model, policy, images, numbers, seed=seed)
        return rank_images(
            model,
            policy,
            images,
            numbers,
            seed=seed,
            num_views=settings.views,
            num_targets=min(settings.targets, settings.views),
            by_component=settings.components,
            inverse=settings.inverse,
        )

    def _read(
        self, reader: Reader, numbers: NDArray[np.int64], samples: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Numbers and clean views of the images that can be decoded."""
        size = self.trained.config.views.image_size
        found, images = [], []
        for number, data in zip(numbers, reader.read_many(samples), strict=True):
            with suppress(Undecodable):
                if isinstance(data, Undecodable):
                    raise data
                images.append(clean_view(decode(data, self.limits), size))
                found.append(number)
        return np.array(found, np.int64), np.array(images, np.uint8)


def _joined(tables: Iterable[Arrays]) -> Arrays:
    found = [table for table in tables if table]
    if not found:
        raise RunError(
            "none of the images chosen for measuring could be read; look at data.path and data.test_path"
        )
    return {name: np.concatenate([table[name] for table in found]) for name in found[0]}


def mean_errors(table: Arrays, questions: Questions, seed: int) -> Metrics:
    """`error/<component>`: error of the prediction as a share of that with the null action, over all strengths that
    change something; below 1 the action helps. `error/mean` of the components. With 95 % intervals over images."""
    changes = table["distance"].mean(0) > 0
    names = [
        name
        for name in dict.fromkeys(questions.components)
        if (changes & (np.array(questions.components) == name)).any()
    ]
    if not names:
        return {}
    columns = [changes & (np.array(questions.components) == name) for name in names]
    sums = np.stack(
        [[table[each][:, rows].sum(1) for rows in columns] for each in ("error", "null_error")]
    )  # [2 c k]

    def figures(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        error, null_error = sums @ weights
        shares = error / null_error
        return np.array([shares.mean(), *shares])

    return named(tuple(f"error/{name}" for name in ("mean", *names)), figures, len(table["number"]), seed)


def _place_in_class(labels: NDArray[np.int32]) -> NDArray[np.int64]:
    """`[k]` classes -> for each row how many of its class come before it."""
    order = np.argsort(labels, kind="stable")
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.empty(len(labels), np.int64)
    place[order] = np.arange(len(labels)) - np.repeat(first, counts)
    return place


def _count(features: Features) -> str:
    return f"{len(features.samples):,}" + f" ({features.unreadable} unreadable)" * (features.unreadable > 0)


def _columns(rows: Sequence[dict[str, Any]]) -> Rows:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _encoder(trained: Trained, name: str) -> FrozenEncoder:
    """`context`, a name of timm's, or NAME=FILE."""
    if name == "context":
        return RunEncoder(trained, "context")
    model, equals, file = name.partition("=")
    if equals:
        return TimmEncoder.open(model, Path(file))
    return TimmEncoder.open(model, pretrained="." in model)


def _rank(test: Features) -> ProbeResult:
    features = torch.from_numpy(np.array(test.values)).float()
    width = features.shape[1]
    return ProbeResult({"rank/rankme": float(rankme(features)), "rank/width": float(width)})
