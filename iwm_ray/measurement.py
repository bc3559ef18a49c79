"""Measures a trained model: each task with its own file of results, beside untrained weights and other encoders.

A result is kept under a key of everything that decides it; asking again for what is there costs nothing. What is slow
(banks of views, features) runs part by part on any number of workers (runtime/measure.py).
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
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
from iwm_ray.data.read import Reader
from iwm_ray.errors import RunError, UsageError
from iwm_ray.evaluation import probes
from iwm_ray.evaluation.action_regression import action_features, regress
from iwm_ray.evaluation.encoders import LAST, FrozenEncoder, RunEncoder, TimmEncoder
from iwm_ray.evaluation.features import Features, measuring
from iwm_ray.evaluation.mrr import rank_images, rank_rows, summarise
from iwm_ray.evaluation.prediction_error import error_rows, make_questions, prediction_errors
from iwm_ray.evaluation.probes import ProbeResult
from iwm_ray.evaluation.rank import lidar, rankme
from iwm_ray.evaluation.settings import WORLD_MODEL, MeasureConfig, TaskName
from iwm_ray.model.iwm import IWM
from iwm_ray.run_directory import write_json
from iwm_ray.runtime.measure import Arrays, Progress, Work, extract, in_order, work_device
from iwm_ray.trained import Trained
from iwm_ray.training.loop import autocast
from iwm_ray.views.resize import clean_view

Metrics = dict[str, float]
Rows = dict[str, NDArray[Any]]
ShowProgress = Callable[[str, str], Progress]
"""task and subject -> what is called as the work goes on"""

TRAINED, UNTRAINED = "trained", "untrained"
_IMAGES_AT_ONCE = 4  # banks of one part


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
        measure = self._world_model if task in WORLD_MODEL else self._representation
        measured, rows = measure(task)
        settings = self.settings.model_dump(mode="json")
        result = TaskResult(task, key, time.monotonic() - begin, settings, self._images(task), measured)
        self._write(result, rows)
        return result

    # What the figures are of

    @cached_property
    def encoders(self) -> dict[str, FrozenEncoder]:
        """Subject -> encoder: the target encoder first, then untrained weights, then what was asked for besides."""
        found: dict[str, FrozenEncoder] = {
            TRAINED: RunEncoder(self.trained),
            UNTRAINED: RunEncoder(self.trained, "untrained"),
        }
        for name in self.settings.encoders:
            found[name] = _encoder(self.trained, name)
        return found

    @cached_property
    def _samples(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of the probes' training and test images."""
        seed, settings = self.trained.config.seed, self.settings
        if self.test:
            train = choose(seed, self.train, settings.train_images or len(self.train), "probe train")
            return train, choose(seed, self.test, settings.test_images or len(self.test), "probe test")
        held = max(1, len(self.train) // 5)
        test = choose(seed, self.train, min(settings.test_images or held, held), "probe")
        return choose(seed, self.train, settings.train_images or len(self.train), "probe", held), test

    def _images(self, task: TaskName) -> str:
        tested = "test images" if self.test else "images held out of data.path"
        if task in WORLD_MODEL:
            asked = self.test or self.train
            return f"{min(self.settings.images, len(asked)):,} {'test' if self.test else 'training'} images"
        train, test = self._samples
        return f"{len(test):,} {tested}" + ("" if task == "rank" else f", {len(train):,} training images")

    def _key(self, task: TaskName) -> str:
        settings = self.settings.model_dump(exclude={"tasks"})
        data = [self.train.hash, self.test.hash if self.test else ""]
        encoders = {} if task in WORLD_MODEL else {name: each.hash for name, each in self.encoders.items()}
        facts = json.dumps([task, self.trained.hash, settings, data, encoders], sort_keys=True)
        return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()

    # World model

    def _world_model(self, task: TaskName) -> tuple[dict[str, Metrics], dict[str, Rows]]:
        index = self.test or self.train
        samples = choose(self.trained.config.seed, index, self.settings.images, "evaluation")
        numbers = np.arange(len(samples))
        parts = [
            (numbers[first : first + _IMAGES_AT_ONCE], samples[first : first + _IMAGES_AT_ONCE])
            for first in range(0, len(samples), _IMAGES_AT_ONCE)
        ]
        row_ids = np.array([index.row_id(int(sample)) for sample in samples])
        measured: dict[str, Metrics] = {}
        rows: dict[str, Rows] = {}
        for subject in (TRAINED, UNTRAINED):
            untrained = subject == UNTRAINED
            make = _AskModel(task, self.trained, untrained, index, self.settings, self.runtime, self.limits)
            with closing(in_order(make, parts, self.runtime, self.show(task, subject))) as found:
                table = _joined(found)
            measured[subject], some_rows = self._summarise(task, table, row_ids)
            if some_rows:
                rows[subject] = some_rows
        return measured, rows

    def _summarise(self, task: TaskName, table: Arrays, row_ids: NDArray[Any]) -> tuple[Metrics, Rows]:
        """Figures and rows of a joined table."""
        policy, seed = self.trained.policy, self.trained.config.seed
        if task == "mrr":
            ranks = rank_rows(table, policy, seed)
            return summarise(table, seed), {"row_id": row_ids[ranks["image"]], **ranks}
        if task == "error":
            errors = error_rows(table, make_questions(policy), seed)
            return mean_errors(errors), errors
        metrics = regress(table, [field.name for field in policy.schema], seed)
        return metrics | {"rank/lidar": float(lidar(torch.from_numpy(table["target"])))}, {}

    # Representation

    def _representation(self, task: TaskName) -> tuple[dict[str, Metrics], dict[str, Rows]]:
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
        return measured, {"heads": _columns(heads)} if heads else {}

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
            for name, columns in rows.items():
                file = self.folder / f"{result.task}-{name}.parquet"
                partial = file.with_name(f".{file.name}")
                pa.parquet.write_table(pa.table(columns), partial)
                partial.replace(file)
            write_json(self.folder / f"{result.task}.json", vars(result))
        except OSError as error:
            raise UsageError(f"{self.folder}: {error.strerror}; make it writable") from None


def kept_result(trained: Trained, task: TaskName) -> TaskResult | None:
    """What a whole (not a cheap) evaluation of this checkpoint has found; None where there was none."""
    return read_result(results_folder(trained) / f"{task}.json")


def results_folder(trained: Trained, cheap: bool = False) -> Path:
    """Where the results of a checkpoint are kept."""
    return trained.run.path / "evaluation" / (trained.path.name + "-cheap" * cheap)


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


def mean_errors(rows: Rows) -> Metrics:
    """`error/<component>`: error of the prediction as a share of that with the null action, over all strengths that
    change something; below 1 the action helps. `error/mean` of the components."""
    metrics = {}
    for component in dict.fromkeys(rows["component"].tolist()):
        asked = (rows["component"] == component) & (rows["distance"] > 0)
        if asked.any():
            metrics[f"error/{component}"] = float(
                rows["error"][asked].sum() / rows["null_error"][asked].sum()
            )
    return {"error/mean": float(np.mean(list(metrics.values())))} | metrics if metrics else {}


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
