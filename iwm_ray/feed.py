"""The feed: rows of the run's stream of samples, each a pure function of its counter.

This is the whole way from a number to training columns: counter -> epoch and sample (data/plan.py) -> bytes
(data/read.py) -> size (data/decode.py) -> draws (views/policy.py) and masks (views/masks.py) -> pixels, crop and
views -> the action log. Ray Data tasks, the local loader and the replay call the same `Feed.rows`. Torch is not
imported here: it would cost every data task seconds and hundreds of megabytes.
"""

import contextlib
import ctypes
import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import cv2
import numpy as np
import xxhash
from numpy.typing import NDArray

from iwm_ray.action_log import ActionLog
from iwm_ray.data.decode import DecodeLimits, EncodedImage, Undecodable, decode
from iwm_ray.data.index import Index
from iwm_ray.data.plan import Plan
from iwm_ray.data.quarantine import Quarantine
from iwm_ray.data.read import Reader
from iwm_ray.views.draws import Draws
from iwm_ray.views.masks import Masks, MaskSampler
from iwm_ray.views.policy import ViewPolicy

_log = logging.getLogger(__name__)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of malloc.h
_LARGEST_THRESHOLD = 32 * 2**20  # the most that glibc allows
_KEPT_BYTES = 512 * 2**20
MAX_KEPT_ARRAY = _LARGEST_THRESHOLD - 2**16
"""bytes; the memory of a larger array comes from the system each time"""

Image = NDArray[np.uint8]
Columns = dict[str, NDArray[Any]]


class Rows(Protocol):
    """A stream of rows, each a pure function of its counter; a small value that travels to every data task."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, nearly."""
        ...

    @property
    def view_bytes(self) -> int:
        """Bytes of a row in its largest column."""
        ...

    def rows(self, counters: NDArray[np.int64]) -> Columns:
        """`[b]` places in the stream, all of one step -> columns of b rows; `counter [b]` is one of them."""
        ...


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
    quarantine: Quarantine | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's view columns, nearly all that a row holds."""
        return len(self._view_names) * self.view_bytes

    @property
    def view_bytes(self) -> int:
        """Bytes of one view or crop."""
        return self.policy.crop_box.size**2 * 3

    def rows(self, counters: NDArray[np.int64]) -> Columns:
        """The rows of one block, logged.

        Args:
            counters: `[b]` places in the stream.

        Returns:
            `counter [b]` and the columns of `make`.
        """
        epochs, _ = self.plan.locate(counters)
        samples = self.plan.samples(counters)
        if self.quarantine is None:
            return self.make(counters, epochs, samples)
        with self.quarantine.making(int(counters[0])) as died_before:
            return self.make(counters, epochs, samples, careful=died_before)

    def make(
        self,
        counters: NDArray[np.int64],
        epochs: NDArray[np.int64],
        samples: NDArray[np.int64],
        careful: bool = False,
    ) -> Columns:
        """The rows of any samples, as they are seen in these epochs; with care, if one of them may end this process.

        Returns:
            `counter [b]`, `action [b a]` float32, `context_idx [b c]`, `target_idx [b t]` int16, `weight [b]`
            float32 (0: quarantined, the views are black), and `source`, `target [b s s 3]` uint8, or
            `crop [b s s 3]` uint8 and `draws [b p]` float32.
        """
        images = self._open(samples, careful)
        heights, widths = _sizes(images)
        draws = self.policy.draw(self.seed, epochs, samples, heights, widths)
        masks = self.masks.draw(self.seed, epochs, samples)
        views, reasons = self._views(images, samples, draws)
        columns: Columns = {
            "counter": counters,
            "action": self.policy.encode(draws),
            "context_idx": masks.context_idx,
            "target_idx": masks.target_idx,
            "weight": np.array([not reason for reason in reasons], np.float32),
            **views,
        }
        if self.where == "device":
            columns["draws"] = self.policy.pack(draws)
        if self.log and self.log.wants(int(counters[0])):
            try:
                self._write_log(columns, epochs, samples, draws, masks, reasons)
            except OSError as error:  # a full disk: training is worth more than its log
                _log.warning("action log: rows from %d on not written (%s)", counters[0], error.strerror)
        if self.quarantine and any(reasons):
            bad = [i for i, reason in enumerate(reasons) if reason]
            try:
                self.quarantine.add(self.index, samples[bad].tolist(), [reasons[i] for i in bad])
            except OSError as error:
                _log.warning("quarantine: %d samples not noted (%s)", len(bad), error.strerror)
        return columns

    def image(self, sample: int) -> Image:
        """One decoded image.

        Raises:
            Undecodable: it can't be read, with the reason.
        """
        return decode(_reader(self.index).read(sample), self.limits)

    @property
    def _view_names(self) -> tuple[str, ...]:
        return ("crop",) if self.where == "device" else ("source", "target")

    def _open(self, samples: NDArray[np.int64], careful: bool) -> list[EncodedImage | Undecodable]:
        """Images whose sizes are known; in the place of one that can't be read, why."""
        found = _reader(self.index).read_many(samples)
        if self.quarantine:
            found = self.quarantine.sift(self.index, samples.tolist(), found, self.limits, careful)
        images: list[EncodedImage | Undecodable] = []
        for data in found:
            try:
                images.append(data if isinstance(data, Undecodable) else EncodedImage.open(data, self.limits))
            except Undecodable as fault:
                images.append(fault)
        return images

    def _views(
        self, images: list[EncodedImage | Undecodable], samples: NDArray[np.int64], draws: Draws
    ) -> tuple[dict[str, NDArray[np.uint8]], list[str]]:
        """The view columns, and for each row why it has none ("" where it has).

        Each image is decoded, cropped and let go in turn: its pixels are still in the processor's cache when
        they are read, and no memory has to be fetched from the system.
        """
        found_whole = _found_whole(self.index)
        size = self.policy.crop_box.size
        columns = {name: np.empty((len(images), size, size, 3), np.uint8) for name in self._view_names}
        reasons = [""] * len(images)
        for i, image in enumerate(images):
            try:
                views = self._views_of(image, bool(found_whole[samples[i]]), draws, i)
                found_whole[samples[i]] = True
            except Undecodable as fault:
                reasons[i] = fault.reason
                views = (np.zeros((size, size, 3), np.uint8),) * len(columns)
            for column, view in zip(columns.values(), views, strict=True):
                column[i] = view
        return columns, reasons

    def _views_of(
        self, image: EncodedImage | Undecodable, was_whole: bool, draws: Draws, i: int
    ) -> tuple[Image, ...]:
        if isinstance(image, Undecodable):
            raise image
        top, _, height, _ = self.policy.crop_box.box(draws, i, image.height, image.width)
        crop = self.policy.crop(image.pixels(top + height if was_whole else None), draws, i)
        return (crop,) if self.where == "device" else self.policy.views(crop, draws, i)

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
        checksums = {f"{view}_checksum": checksums_of(columns[view]) for view in self._view_names}
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


def checksums_of(views: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """XXH3 of each image, the same that the action log holds: ten times cheaper than CRC-32, a tenth of the log's
    cost."""
    return np.array([xxhash.xxh3_64_intdigest(np.ascontiguousarray(view).data) for view in views], np.uint64)


def _sizes(images: list[EncodedImage | Undecodable]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`[b]` heights and `[b]` widths; 0 where there is no image."""
    sizes = [(0, 0) if isinstance(image, Undecodable) else (image.height, image.width) for image in images]
    heights, widths = np.array(sizes, np.int64).reshape(-1, 2).T
    return heights, widths


@lru_cache(maxsize=4)
def _reader(index: Index) -> Reader:
    """One set of open files for an index, not one for each sample."""
    # One task has one CPU; a thread for each CPU of the node would only wait for the others.
    cv2.setNumThreads(1)
    _keep_freed_memory()
    return Reader(index)


@lru_cache(maxsize=4)
def _found_whole(index: Index) -> NDArray[np.bool_]:
    """`[n]` the samples that this process has decoded to their end without a fault. Of these no row below the crop is
    decoded again, which gives the same pixels and the same verdict, whichever process does it: damage shows at the end."""
    return np.zeros(len(index), bool)


def _keep_freed_memory() -> None:
    """Lets glibc give out freed memory again, up to a bound. It would hand that of each image and block back to the
    system, which clears the next page by page: a twentieth of a row's time."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
