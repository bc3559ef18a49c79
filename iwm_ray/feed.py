"""The feed: rows of the run's stream of samples, each a pure function of its counter.

This is the whole way from a number to training columns: counter -> epoch and sample (data/plan.py) -> bytes (data/index.py)
-> pixels (data/decode.py) -> crop, views, action (views/policy.py) -> masks (views/masks.py) -> the action log. Ray Data
tasks, the local loader and the replay call the same `Feed.rows`. Torch is not imported here: it would cost every data
task seconds and hundreds of megabytes.
"""

import json
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_ray.action_log import ActionLog
from iwm_ray.data.decode import DecodeLimits, Undecodable, decode
from iwm_ray.data.index import Index
from iwm_ray.data.plan import Plan
from iwm_ray.data.read import Reader
from iwm_ray.views.draws import Draws
from iwm_ray.views.masks import Masks, MaskSampler
from iwm_ray.views.policy import ViewPolicy

Image = NDArray[np.uint8]
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Feed:
    """Makes the rows of the stream; a small value that travels to every data task."""

    seed: int
    plan: Plan
    index: Index
    policy: ViewPolicy
    masks: MaskSampler
    limits: DecodeLimits
    where: str
    """host: rows hold `source` and `target`; device: rows hold `crop` and `draws`"""
    log: ActionLog | None = None
    quarantine: Path | None = None

    def rows(self, counters: NDArray[np.int64]) -> Columns:
        """The rows of one block, logged.

        Args:
            counters: `[b]` places in the stream.

        Returns:
            `counter [b]` and the columns of `make`.
        """
        epochs, _ = self.plan.locate(counters)
        return self.make(counters, epochs, self.plan.samples(counters))

    def make(
        self, counters: NDArray[np.int64], epochs: NDArray[np.int64], samples: NDArray[np.int64]
    ) -> Columns:
        """The rows of any samples, as they are seen in these epochs.

        Returns:
            `counter [b]`, `action [b a]` float32, `context_idx [b c]`, `target_idx [b t]` int16, `weight [b]` float32
            (0: quarantined), and `source`, `target [b s s 3]` uint8, or `crop [b s s 3]` uint8 and `draws [b p]` float32.
        """
        images, reasons = self._images(samples)
        draws = self.draw(epochs, samples, images)
        masks = self.masks.draw(self.seed, epochs, samples)
        columns: Columns = {
            "counter": counters,
            "action": self.policy.encode(draws),
            "context_idx": masks.context_idx,
            "target_idx": masks.target_idx,
            "weight": np.array([image is not None for image in images], np.float32),
        }
        columns |= self.pixels(images, draws)
        if self.log and self.log.wants(int(counters[0])):
            self._write_log(columns, epochs, samples, draws, masks, reasons)
        if self.quarantine and any(reasons):
            self._write_quarantine(samples, reasons)
        return columns

    def draw(
        self, epochs: NDArray[np.int64], samples: NDArray[np.int64], images: list[Image | None]
    ) -> Draws:
        """The parameters of both views of each image; a missing image counts as one without pixels."""
        heights = np.array([0 if image is None else image.shape[0] for image in images], np.int64)
        widths = np.array([0 if image is None else image.shape[1] for image in images], np.int64)
        return self.policy.draw(self.seed, epochs, samples, heights, widths)

    def pixels(self, images: list[Image | None], draws: Draws) -> Columns:
        """The view columns of decoded images; a missing image is black."""
        size = self.policy.crop_box.size
        shape = (len(images), size, size, 3)
        if self.where == "device":
            crops = np.zeros(shape, np.uint8)
            for i, image in enumerate(images):
                if image is not None:
                    crops[i] = self.policy.crop(image, draws, i)
            return {"crop": crops, "draws": self.policy.pack(draws)}
        sources, targets = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
        for i, image in enumerate(images):
            if image is not None:
                sources[i], targets[i] = self.policy.views(self.policy.crop(image, draws, i), draws, i)
        return {"source": sources, "target": targets}

    def image(self, sample: int) -> Image:
        """One decoded image.

        Raises:
            Undecodable: it can't be read, with the reason.
        """
        return decode(_reader(self.index).read(sample), self.limits)

    def _images(self, samples: NDArray[np.int64]) -> tuple[list[Image | None], list[str]]:
        images: list[Image | None] = []
        reasons: list[str] = []
        for sample in samples:
            try:
                images.append(self.image(int(sample)))
                reasons.append("")
            except Undecodable as error:
                images.append(None)
                reasons.append(str(error))
        return images, reasons

    def _write_log(
        self,
        columns: Columns,
        epochs: NDArray[np.int64],
        samples: NDArray[np.int64],
        draws: Draws,
        masks: Masks,
        reasons: list[str],
    ) -> None:
        assert self.log is not None
        checksums = {f"{view}_checksum": checksums_of(columns[view]) for view in _view_columns(columns)}
        self.log.write(
            {
                "epoch": epochs,
                "step": columns["counter"] // self.plan.global_batch_size,
                "counter": columns["counter"],
                "sample": samples,
                "row_id": [self.index.row_id(int(sample)) for sample in samples],
                "path": [self.index.path(int(sample)) for sample in samples],
                "label": self.index.labels[samples],
                **draws,
                "action": columns["action"],
                "mask_blocks": masks.blocks,
                **checksums,
                "error": reasons,
            }
        )

    def _write_quarantine(self, samples: NDArray[np.int64], reasons: list[str]) -> None:
        assert self.quarantine is not None
        known = self.quarantine.read_text() if self.quarantine.exists() else ""
        for sample, reason in zip(samples, reasons, strict=True):
            record = {
                "row_id": self.index.row_id(int(sample)),
                "path": self.index.path(int(sample)),
                "reason": reason,
            }
            line = json.dumps(record) + "\n"
            if reason and line not in known:  # the sample comes back in every epoch
                with self.quarantine.open("a") as file:
                    file.write(line)


def checksums_of(views: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """CRC-32 of each image, the same that the action log holds."""
    return np.array([zlib.crc32(np.ascontiguousarray(view)) for view in views], np.uint32)


def _view_columns(columns: Columns) -> list[str]:
    return [name for name in ("source", "target", "crop") if name in columns]


@lru_cache(maxsize=4)
def _reader(index: Index) -> Reader:
    """One set of open files for each index in a process, however often the feed arrives there."""
    return Reader(index)
