"""A segmentation: its data, networks and results."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from iwm_ray.data.quarantine import Quarantine
from iwm_ray.data.read import content_hash
from iwm_ray.errors import RunError
from iwm_ray.evaluation.features import Features
from iwm_ray.finetuning.arms import TUNES, Arm, Family, figure_name, read_arm, read_figures
from iwm_ray.finetuning.data import Extract, Images, Tokens, encode, note_missing
from iwm_ray.finetuning.experiment import cache_of
from iwm_ray.finetuning.fit import Fitted
from iwm_ray.finetuning.model import Start, Tuned
from iwm_ray.finetuning.tuning import Tuning, refuse_other_images, tokens_fit
from iwm_ray.run_directory import write_json
from iwm_ray.segmentation import segmenter
from iwm_ray.segmentation.data import Pairs, PairSteps, open_pairs
from iwm_ray.segmentation.network import PixelObjective, WholeEncoder, assemble, image_size, measure, predict
from iwm_ray.segmentation.settings import SegmentConfig
from iwm_ray.segmentation.summary import miou_of_present
from iwm_ray.trained import Trained
from iwm_ray.views.resize import CLEAN_VIEW

NUM_PICTURED = 6
"""test images whose predictions are kept for the picture"""


@dataclass(frozen=True)
class Segmentation(Tuning):
    """A segmentation, resolved."""

    config: SegmentConfig
    train: Pairs
    test: Pairs
    task: str
    """name of the data, in metrics and of the folder"""
    extract: Extract = encode
    """how cached tokens are made: `encode` in this process, or what the runtime offers"""
    _tokens: dict[bool, Features] = field(default_factory=dict)
    """what has been extracted so far: of the images, and of their mirror images"""

    @classmethod
    def open(
        cls, trained: Trained, config: SegmentConfig, output: Path | None, extract: Extract = encode
    ) -> "Segmentation":
        """Opens the data and checks what can be checked before anything is trained.

        Raises:
            UsageError: data or settings that don't fit.
        """
        size = image_size(trained, config)
        if size == trained.config.views.image_size and not (output and _begun_size(output) == size):
            config = config.model_copy(update={"image_size": 0})  # the same, said in another way
        train, test = open_pairs(config, trained.config, size, cache_of(trained, config))
        task = _task_name(config.data.path)
        folder = output or trained.run.path / "finetune" / f"segment-{task}"
        found = cls(trained, config, folder.absolute(), train, test, task, extract)
        if output is None:
            found = replace(found, folder=Path(f"{found.folder}-{found.name}"))
        train, test = (
            replace(pairs, quarantine=Quarantine(found.folder / "quarantine" / f"{part}.jsonl"))
            for pairs, part in ((train, "train"), (test, "test"))
        )
        found = replace(found, train=train, test=test)
        found.check_batch(True)
        found.check_folder()
        return found

    @cached_property
    def name(self) -> str:
        parts = [self.task, self.trained.hash, str(self.batch_size), *self.train.classes.names]
        parts += [CLEAN_VIEW, repr(self.train.classes.table)]
        for pairs in (self.train, self.test):
            parts += [content_hash(pairs.index), pairs.masks_hash]
        return self.config.hash(*parts)

    def __getstate__(self) -> dict[str, Any]:
        """Tokens stay here: who gets a copy maps them himself."""
        return self.__dict__ | {"_tokens": {}}

    def record(self) -> dict[str, Any]:
        return super().record() | {"class_names": list(self.train.classes.names)}

    @property
    def families(self) -> list[Family]:
        """Every part to tune, with its control."""
        starts: dict[str, tuple[Start, ...]] = {"encoder": ("none",)}
        return [
            Family(tune, start, (self.task,))
            for tune in self.config.tune
            for start in starts.get(tune, ("pretrained", "random"))
        ]

    @property
    def image_sets(self) -> dict[str, Images]:
        return {f"training images of {self.task}": self.train, f"test images of {self.task}": self.test}

    @property
    def batch_size(self) -> int:
        held = self._num_held_out if self.config.chooses_rate else 0
        return min(self.config.batch_size, len(self.train) - held)

    @property
    def _num_held_out(self) -> int:
        return min(max(1, round(self.config.data.held_out * len(self.train))), len(self.train) - 1)

    def num_steps_of(self, arm: Arm) -> int:
        return self.config.steps

    def assemble(self, arm: Arm) -> Tuned:
        count, model = len(self.train.classes.names), self.trained.load()
        return assemble(self.trained, model, self.config, arm.tune, arm.start, count, arm.seed)

    def objective(self, arm: Arm) -> PixelObjective:
        return PixelObjective(self.trained.policy.action_dim)

    def rows(self, arm: Arm) -> PairSteps:
        train, _ = self._splits(arm)
        tokens = self._features() if self.has_tokens(arm) else None
        return PairSteps(replace(train, augment=self.config.augment), self.batch_size, arm.seed, tokens)

    def _splits(self, arm: Arm) -> tuple[Pairs, Pairs]:
        """What an arm is trained and judged on."""
        if not arm.is_choice:
            return self.train, self.test
        kept = len(self.train) - self._num_held_out
        return self.train.part(0, kept), self.train.part(kept, len(self.train))

    def has_tokens(self, arm: Arm) -> bool:
        """Crops are others at every step; whole images, mirrored or not, are not."""
        if arm.tune != "predictor" or self.config.augment.crop_area < 1:
            return False
        with torch.device("meta"):
            encoder = self.trained.untrained().encoder
        encoder.grid = (self.train.size // encoder.patch_size,) * 2
        copies = 2 if self.config.augment.flip_probability else 1
        return tokens_fit(encoder, copies * len(self.train), self.config.runtime)

    def prepare(self, arms: Sequence[Arm]) -> None:
        """Has the tokens extracted, if one of these arms needs them."""
        if any(map(self.has_tokens, arms)):
            self._features()
        for found in self._tokens.values():
            note_missing(self.train, found)

    def _features(self) -> Tokens:
        """Tokens of the training images and, with flips, of their mirror images."""
        flips = self.config.augment.flip_probability
        return Tokens(self._extracted(False), self._extracted(True) if flips else None)

    def _extracted(self, mirrored: bool) -> Features:
        if mirrored not in self._tokens:
            encoder = WholeEncoder(self.trained, self.config.encoder, self.train.size, mirrored)
            self._tokens[mirrored] = self.extract(encoder, self.train)
        return self._tokens[mirrored]

    def judge(self, arm: Arm, tuned: Tuned, fitted: Fitted) -> None:
        """Counts right pixels; keeps, of the first seed, predictions for the picture, and the segmenter where it is due."""
        config, action_dim = self.config, self.trained.policy.action_dim
        _, judged = self._splits(arm)
        counts = measure(tuned, judged, config, action_dim)
        if not arm.is_choice and not self.pictured(arm.family).exists():
            shown = predict(tuned, self.test, self.pictured_places, action_dim, config.runtime)[2]
            self.pictured(arm.family).parent.mkdir(exist_ok=True)
            staged = self.pictured(arm.family).with_name(f".{arm.name}.npy")  # arms may run beside each other
            np.save(staged, shown.numpy())
            staged.replace(self.pictured(arm.family))
        if self.keeps(arm):
            names, model = self.train.classes.names, self.trained.load()
            segmenter.save(self.adapter(arm), tuned, self.trained, model, config, names)
        place = self._place(arm)
        np.save(place.with_suffix(".npy"), counts)
        facts = {
            "settings": self.config.deciding(),
            "figures": {self._figure(arm): miou_of_present(counts)},
            "trained_parameters": tuned.num_trained,
            "inputs": "tokens" if self.has_tokens(arm) else "images",
            "loss": fitted.loss,
            "images_per_second": fitted.num_images / fitted.seconds,
            "peak_memory": fitted.peak_memory,
        }
        write_json(place.with_suffix(".json"), {"arm": asdict(arm)} | facts)

    def has_result(self, arm: Arm) -> bool:
        is_whole = not self.keeps(arm) or segmenter.exists(self.adapter(arm))
        return is_whole and self._place(arm).with_suffix(".json").exists()

    def figures(self, arm: Arm) -> dict[str, float]:
        return read_figures(self._place(arm).with_suffix(".json"))

    def _figure(self, arm: Arm) -> str:
        if arm.is_choice:
            return f"held_out/{self.task}/miou"
        return figure_name(arm.family, self.task, "miou", self.config.ways)

    def score(self, arm: Arm) -> float:
        """mIoU over the classes that the images have."""
        return miou_of_present(self._counts(arm))

    def judged(self) -> list[Arm]:
        """All finished arms that were judged on the test set, whichever call has run them.

        Raises:
            RunError: a file is damaged.
        """
        arms = [read_arm(path) for path in (self.folder / "arms").glob("*.json")]

        def order(arm: Arm) -> tuple[int, str, int]:
            return TUNES.index(arm.tune), arm.start, arm.seed

        return sorted((arm for arm in arms if not arm.is_choice), key=order)

    def counts(self) -> dict[Family, dict[int, NDArray[np.int64]]]:
        """`[k 3 c]` of every family and seed that has been run.

        Raises:
            RunError: a file is damaged, or they were judged on different images.
        """
        found: dict[Family, dict[int, NDArray[np.int64]]] = {}
        for arm in self.judged():
            found.setdefault(arm.family, {})[arm.seed] = self._counts(arm)
        files = {self._place(arm).with_suffix(".json"): arm for arm in self.judged()}
        refuse_other_images({path: len(found[arm.family][arm.seed]) for path, arm in files.items()})
        return found

    def _counts(self, arm: Arm) -> NDArray[np.int64]:
        path = self._place(arm).with_suffix(".npy")
        try:
            counts: NDArray[np.int64] = np.load(path)
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path}: damaged ({error}); remove the arm's files, and it is run again"
            ) from None
        return counts

    def costs(self) -> dict[Arm, dict[str, Any]]:
        """What each arm trained and how fast."""
        return {arm: json.loads(self._place(arm).with_suffix(".json").read_text()) for arm in self.judged()}

    @property
    def pictured_places(self) -> NDArray[np.int64]:
        """The test images of the picture: the first that can be decoded."""
        found: list[int] = []
        for place in range(len(self.test)):
            if len(found) == NUM_PICTURED:
                break
            at = np.array([place])
            found += [place] * int(self.test.read(at, np.zeros_like(at), 0)[2].sum())
        return np.array(found, np.int64)

    def pictured(self, family: Family) -> Path:
        """The predictions of a family's first arm for these images."""
        return self.folder / "pictured" / f"{family.tune}-{family.start}.npy"

    def _place(self, arm: Arm) -> Path:
        """Of the arm's files, without their endings."""
        return self.folder / "arms" / arm.name.replace(".", "_")


def _begun_size(folder: Path) -> object:
    """The image size with which a folder was begun; None where none can be read."""
    with suppress(OSError, ValueError, AttributeError):
        return json.loads((folder / "config.json").read_text()).get("image_size")
    return None


def _task_name(path: str) -> str:
    """The data's name: its folder's, passing over words that all data sets use."""
    parts = [part for part in path.replace("\\", "/").split("/") if part]
    named = [part for part in parts if part not in ("train", "val", "test", "images", "image")]
    return re.sub(r"[^A-Za-z0-9_-]", "_", named[-1]) if named else "data"
