"""All arms of a finetuning, one after the other, and what they share: data, cached tokens, the trained model."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from iwm_ray.build import cache_folder
from iwm_ray.config import RuntimeConfig
from iwm_ray.errors import UsageError
from iwm_ray.evaluation.encoders import RunEncoder
from iwm_ray.evaluation.features import Features
from iwm_ray.finetuning import adapter
from iwm_ray.finetuning.arms import (
    Arm,
    ArmResult,
    Family,
    choices,
    default_lr,
    families,
    finals,
    read_result,
    write_result,
)
from iwm_ray.finetuning.data import ImageRows, Rows, Steps, Task, TokenRows, alternate, encode, open_tasks
from iwm_ray.finetuning.fit import fit, measure
from iwm_ray.finetuning.model import Asking, Tuned, assemble, seeded, weights_hash
from iwm_ray.finetuning.settings import FinetuneConfig
from iwm_ray.model.iwm import IWM
from iwm_ray.run_directory import write_json
from iwm_ray.trained import Trained
from iwm_ray.training.loop import autocast, choose_attention

Extract = Callable[[RunEncoder, ImageRows], Features]
"""the tokens `[k n d]` of a frozen encoder for the readable images of some rows"""
Say = Callable[[Arm, int, int, int, float], None]
"""arm, steps done, steps of the arm, images done, loss"""


@dataclass(frozen=True)
class Experiment:
    """A finetuning, resolved."""

    trained: Trained
    config: FinetuneConfig
    tasks: dict[str, Task]
    folder: Path
    """RUN/finetune/NAME"""
    device: torch.device
    extract: Extract = encode
    """how cached tokens are made: `encode` in this process, or what the runtime offers"""
    _tokens: dict[str, Features] = field(default_factory=dict)
    """what has been extracted so far"""

    @classmethod
    def open(
        cls, trained: Trained, config: FinetuneConfig, output: Path | None, extract: Extract = encode
    ) -> "Experiment":
        """Opens the data and checks what can be checked before anything is trained.

        Raises:
            UsageError: data or settings that don't fit.
        """
        cache = cache_of(trained, config)
        tasks = {task.name: task for task in open_tasks(config, trained.config, cache)}
        if config.runtime.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("runtime.device cuda: torch sees no GPU here; use auto or cpu")
        kind = config.runtime.device
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "cpu"
        folder = output or trained.run.path / "finetune" / _name(trained, config, tasks)
        experiment = cls(trained, config, tasks, folder.absolute(), torch.device(kind), extract)
        experiment._refuse_other()
        return experiment

    def start(self) -> None:
        """Records the configuration in the folder."""
        record = {"name": _name(self.trained, self.config, self.tasks)} | self.config.model_dump(mode="json")
        write_json(self.folder / "config.json", record)

    def _refuse_other(self) -> None:
        """Raises UsageError where the folder holds the arms of another finetuning."""
        path, name = self.folder / "config.json", _name(self.trained, self.config, self.tasks)
        if path.exists() and json.loads(path.read_text()).get("name") != name:
            raise UsageError(
                f"--output {self.folder}: holds a finetuning with another checkpoint, data or settings; choose another "
                "--output"
            )

    @property
    def families(self) -> list[Family]:
        return list(families(self.config, tuple(self.tasks)))

    def num_steps(self, tasks: tuple[str, ...]) -> list[int]:
        """Optimizer steps of each of these tasks: the same in company and alone."""
        config, own = self.config, []
        for task in self.tasks.values():
            size = min(config.batch_size, len(task.train))
            own.append(config.steps or max(1, round(config.epochs * (len(task.train) // size))))
        if config.data.weights:
            shares = np.array(config.data.weights) / sum(config.data.weights)
            own = [max(1, round(share * sum(own))) for share in shares]
        by_name = dict(zip(self.tasks, own, strict=True))
        return [by_name[name] for name in tasks]

    def num_images(self, arm: Arm) -> int:
        """Images that an arm trains on, counted as often as they are seen."""
        sizes = [min(self.config.batch_size, len(self.tasks[name].train)) for name in arm.tasks]
        return sum(steps * size for steps, size in zip(self.num_steps(arm.tasks), sizes, strict=True))

    def planned(self) -> list[Arm]:
        """Every arm that a fresh run trains; rates that are still to be chosen stand as the first of the grid."""
        arms: list[Arm] = []
        for family in self.families:
            arms += choices(self.config, family)
            arms += finals(self.config, family, default_lr(self.config))
        return arms

    def run(self, say: Say) -> dict[Arm, ArmResult]:
        """Trains and measures all arms that are not finished; gives the results of those judged on the test set."""
        model = self.trained.load()
        results: dict[Arm, ArmResult] = {}
        for family in self.families:
            lr = self._choose(model, family, say)
            for arm in finals(self.config, family, lr):
                results[arm] = self.finished(arm) or self._run_arm(model, arm, say)
        return results

    def finished(self, arm: Arm) -> ArmResult | None:
        """An arm's result, if it has been run and its adapter, where one is due, is there."""
        if self._has_adapter(arm) and not adapter.exists(self.adapter(arm)):
            return None
        return read_result(self.folder / "arms", arm)

    def _choose(self, model: IWM, family: Family, say: Say) -> float:
        """The rate with the best accuracy on held-out training images; the first of equals."""
        candidates = choices(self.config, family)
        if not candidates:
            return default_lr(self.config)
        scores = []
        for arm in candidates:
            result = self.finished(arm) or self._run_arm(model, arm, say)
            scores.append(float(np.mean([result.rights(task).mean() for task in arm.tasks])))
        return candidates[int(np.argmax(scores))].lr

    def _run_arm(self, model: IWM, arm: Arm, say: Say) -> ArmResult:
        config, names = self.config, arm.tasks
        tuned = assemble(
            self.trained,
            model,
            config,
            arm.tune,
            arm.start,
            {name: len(self.tasks[name].class_names) for name in names},
            arm.seed,
        )
        before, head_hash = weights_hash(tuned.encoder), weights_hash(tuned.heads)
        tuned.to(self.device)
        choose_attention(tuned, self._precision, self.device)
        cached = arm.tune == "predictor" and self._keeps_tokens()
        train, judged = self._splits(arm, cached)
        schedule = alternate(self.num_steps(names))
        steps = Steps(tuple(train), schedule, config.batch_size, arm.seed)
        with seeded(arm.seed, "fit", 0):  # drop path draws
            fitted = fit(
                tuned,
                names,
                steps.batches(0 if cached else config.runtime.data_workers),
                len(schedule),
                config,
                arm.start,
                arm.lr,
                self._asking(tuned),
                arm.seed,
                lambda done, images, loss: say(arm, done, len(schedule), images, loss),
                self._cast,
            )
        correct = {
            name: measure(tuned, name, rows, self._asking(tuned), 2 * config.batch_size, self._cast)
            for name, rows in zip(names, judged, strict=True)
        }
        result = ArmResult(
            correct={name: "".join("01"[int(right)] for right in rights) for name, rights in correct.items()},
            steps=len(schedule),
            num_images=fitted.num_images,
            loss=fitted.loss,
            trained_parameters=tuned.num_trained,
            images_per_second=fitted.num_images / fitted.seconds,
            peak_memory=fitted.peak_memory,
            inputs="tokens" if cached else "images",
            encoder_hash=weights_hash(tuned.encoder),
            head_hash=head_hash,
        )
        if self._has_adapter(arm):
            class_names = {name: self.tasks[name].class_names for name in names}
            adapter.save(self.adapter(arm), tuned, self.trained, config, class_names, before)
        write_result(self.folder / "arms", arm, result)
        return result

    def _has_adapter(self, arm: Arm) -> bool:
        """Whether the tuned network is kept: that of the first seed, and of no control."""
        return arm.start != "random" and not arm.is_choice and arm.seed == self.config.seeds[0]

    def adapter(self, arm: Arm) -> Path:
        """Where the arm's adapter is kept."""
        return self.folder / "adapters" / arm.name

    def _splits(self, arm: Arm, cached: bool) -> tuple[list[Rows], list[Rows]]:
        """What the arm trains on and what it is judged on, for each of its tasks."""
        train: list[Rows] = []
        judged: list[Rows] = []
        for name in arm.tasks:
            task, count = self.tasks[name], len(self.tasks[name].train)
            kept = count - task.num_held_out(self.config.data.held_out) if arm.is_choice else count
            training = task.train.part(0, kept)
            measured = task.train.part(kept, count) if arm.is_choice else task.test
            if cached:
                train.append(self._cached(task.train, training, self.config.augment.flip_probability))
                judged.append(self._cached(task.train if arm.is_choice else task.test, measured, 0.0))
            else:
                train.append(replace(training, augment=self.config.augment))
                judged.append(measured)
        return train, judged

    def _keeps_tokens(self) -> bool:
        """Whether all tokens fit into the memory meant for them."""
        run, config = self.trained.config, self.config
        if not config.augment.keeps_tokens:
            return False
        copies = 2 if config.augment.flip_probability else 1
        images = sum(copies * len(task.train) + len(task.test) for task in self.tasks.values())
        with torch.device("meta"):
            width = self.trained.untrained().encoder.width
        num_bytes = images * run.grid[0] * run.grid[1] * width * 4
        return num_bytes <= config.runtime.token_gigabytes * 1e9

    def _cached(self, whole: ImageRows, part: ImageRows, flip_probability: float) -> TokenRows:
        """Tokens of some rows of a split whose tokens are extracted whole, once."""
        plain = _select(self._features(whole, mirrored=False), part)
        if not flip_probability:
            return TokenRows(plain)
        return TokenRows(plain, _select(self._features(whole, mirrored=True), part), flip_probability)

    def _features(self, rows: ImageRows, mirrored: bool) -> Features:
        encoder = RunEncoder(self.trained, self.config.encoder, for_predictor=True, mirrored=mirrored)
        name = f"{encoder.hash} {rows.index.hash} {len(rows)}"
        if name not in self._tokens:
            self._tokens[name] = self.extract(encoder, rows)
        return self._tokens[name]

    def _asking(self, tuned: Tuned) -> Asking:
        rows, columns = tuned.encoder.grid
        config = self.config
        return Asking(self.trained.policy, rows * columns, config.action == "random", config.target_fraction)

    def _cast(self) -> AbstractContextManager:
        return autocast(self._precision, self.device)

    @property
    def _precision(self) -> RuntimeConfig:
        return RuntimeConfig(precision=self.config.runtime.precision)


def cache_of(trained: Trained, config: FinetuneConfig) -> Path:
    """Where data indices and tokens are kept: as the run did, unless told otherwise."""
    given = config.runtime.cache
    return Path(given).expanduser().absolute() if given else cache_folder(trained.config)


def by_family(results: dict[Arm, ArmResult]) -> Iterator[tuple[Family, list[ArmResult]]]:
    """Results of the same family, in the order of their seeds."""
    for family in dict.fromkeys(arm.family for arm in results):
        yield family, [result for arm, result in results.items() if arm.family == family]


def _select(features: Features, rows: ImageRows) -> Features:
    """The features of these rows alone, labelled as they are: in the classes of the task, not of the index."""
    places = {int(sample): place for place, sample in enumerate(rows.samples)}
    found = np.array([places.get(int(sample), -1) for sample in features.samples])
    kept = found >= 0
    values = features.values if kept.all() else features.values[kept]
    return replace(features, values=values, labels=rows.labels[found[kept]], samples=features.samples[kept])


def _name(trained: Trained, config: FinetuneConfig, tasks: dict[str, Task]) -> str:
    """Names the finetuning by what decides its results."""
    hashes = [part.index.hash for task in tasks.values() for part in (task.train, task.test)]
    return "+".join(tasks) + "-" + config.hash(trained.hash, *tasks, *hashes)
