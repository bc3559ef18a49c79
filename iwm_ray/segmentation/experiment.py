"""All arms of a segmentation, one after the other; a finished one is not run again."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from iwm_ray.build import cache_folder
from iwm_ray.errors import RunError, UsageError
from iwm_ray.finetuning.arms import Arm, Family
from iwm_ray.finetuning.model import Start, Tuned, seeded
from iwm_ray.model.iwm import IWM
from iwm_ray.run_directory import write_json
from iwm_ray.segmentation import segmenter
from iwm_ray.segmentation.data import Pairs, open_pairs
from iwm_ray.segmentation.network import assemble, fit, image_size, measure
from iwm_ray.segmentation.settings import SegmentConfig
from iwm_ray.trained import Trained

Say = Callable[[Arm, int, int, float], None]
"""arm, steps done, steps of the arm, loss"""


@dataclass(frozen=True)
class Segmentation:
    """A segmentation, resolved."""

    trained: Trained
    config: SegmentConfig
    train: Pairs
    test: Pairs
    task: str
    """name of the data, in metrics and of the folder"""
    folder: Path
    """RUN/finetune/NAME"""
    device: torch.device

    @classmethod
    def open(cls, trained: Trained, config: SegmentConfig, output: Path | None) -> "Segmentation":
        """Opens the data and checks what can be checked before anything is trained.

        Raises:
            UsageError: data or settings that don't fit.
        """
        given = config.runtime.cache
        cache = Path(given).expanduser().absolute() if given else cache_folder(trained.config)
        train, test = open_pairs(config, trained.config, image_size(trained, config), cache)
        if config.runtime.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("runtime.device cuda: torch sees no GPU here; use auto or cpu")
        kind = config.runtime.device
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "cpu"
        task = _task_name(config.data.path)
        folder = output or trained.run.path / "finetune" / f"segment-{task}"
        found = cls(trained, config, train, test, task, folder.absolute(), torch.device(kind))
        if output is None:
            found = replace(found, folder=Path(f"{found.folder}-{found.hash}"))
        found._refuse_other()
        return found

    @property
    def hash(self) -> str:
        """Names what decides the results."""
        parts = [self.trained.hash, self.train.index.hash, self.test.index.hash, *self.train.classes.names]
        return self.config.hash(*parts, repr(self.train.classes.table))

    def _refuse_other(self) -> None:
        path = self.folder / "config.json"
        if path.exists() and json.loads(path.read_text()).get("hash") != self.hash:
            raise UsageError(
                f"--output {self.folder}: holds another segmentation or finetuning; choose another --output"
            )

    @property
    def families(self) -> Iterator[Family]:
        """Every part to tune, with its control."""
        for tune in self.config.tune:
            starts: tuple[Start, ...] = ("none",) if tune == "encoder" else ("pretrained", "random")
            for start in starts:
                yield Family(tune, start, (self.task,))

    @property
    def arms(self) -> list[Arm]:
        """In the order in which they run."""
        return [
            Arm(family.tune, family.start, family.tasks, seed, self.config.lr)
            for family in self.families
            for seed in self.config.seeds
        ]

    def run(self, say: Say, keep: Callable[[Arm, Tuned], None]) -> None:
        """Trains and measures all arms that are not finished.

        Args:
            say: see Say.
            keep: gets every trained network of the first seed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(
            self.folder / "config.json",
            {"hash": self.hash, "class_names": self.train.classes.names}
            | self.config.model_dump(mode="json"),
        )
        model = self.trained.load()
        for arm in self.arms:
            if not self.is_finished(arm):
                self._run_arm(model, arm, say, keep)

    def is_finished(self, arm: Arm) -> bool:
        """Whether the arm's result is there."""
        return self._place(arm).with_suffix(".json").exists()

    def counts(self) -> dict[Family, NDArray[np.int64]]:
        """`[s k 3 c]` of every family, once all arms have been run.

        Raises:
            RunError: a file is damaged.
        """
        found: dict[Family, list[NDArray[np.int64]]] = {}
        for arm in self.arms:
            path = self._place(arm).with_suffix(".npy")
            try:
                found.setdefault(arm.family, []).append(np.load(path))
            except (OSError, ValueError) as error:
                raise RunError(
                    f"{path}: damaged ({error}); remove the arm's files, and it is run again"
                ) from None
        return {family: np.stack(arrays) for family, arrays in found.items()}

    def costs(self) -> list[dict[str, Any]]:
        """What each arm trained and how fast."""
        return [json.loads(self._place(arm).with_suffix(".json").read_text()) for arm in self.arms]

    def _run_arm(self, model: IWM, arm: Arm, say: Say, keep: Callable[[Arm, Tuned], None]) -> None:
        config, action_dim = self.config, self.trained.policy.action_dim
        num_classes = len(self.train.classes.names)
        tuned = assemble(self.trained, model, config, arm.tune, arm.start, num_classes, arm.seed)
        tuned.to(self.device)
        train = replace(self.train, augment=config.augment)

        def report(step: int, loss: float) -> None:
            say(arm, step, config.steps, loss)

        with seeded(arm.seed, "fit", 0):
            fitted = fit(tuned, train, config, arm.start, action_dim, arm.seed, report)
        counts = measure(tuned, self.test, config, action_dim)
        if arm.seed == config.seeds[0]:
            keep(arm, tuned)
            if arm.start != "random":
                names = self.train.classes.names
                segmenter.save(self.segmenter(arm), tuned, self.trained, model, config, names)
        place = self._place(arm)
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(place.with_suffix(".npy"), counts)
        facts = {"trained_parameters": tuned.num_trained} | asdict(fitted)
        write_json(place.with_suffix(".json"), asdict(arm) | facts)

    def segmenter(self, arm: Arm) -> Path:
        """Where the arm's segmenter is kept: of the first seed, and of no control."""
        return self.folder / "adapters" / arm.name

    def _place(self, arm: Arm) -> Path:
        """Of the arm's files, without their endings."""
        return self.folder / "arms" / arm.name.replace(".", "_")


def _task_name(path: str) -> str:
    """The data's name: its folder's, passing over words that all data sets use."""
    parts = [part for part in path.replace("\\", "/").split("/") if part]
    named = [part for part in parts if part not in ("train", "val", "test", "images", "image")]
    return re.sub(r"[^A-Za-z0-9_-]", "_", named[-1]) if named else "data"
