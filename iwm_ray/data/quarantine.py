"""The samples that a run can't use: a file that all its data tasks share.

What merely can't be decoded is noted, and tried again in the next epoch. What ends the process that decodes it (a bug
in a decoder, no memory) would end every try. So a block leaves a mark while it is made; where a block finds its own
mark, whoever made it before has died, and each of its images goes to another process first (data/taster.py). What
ends that one is noted as deadly, and not touched again.
"""

import contextlib
import fcntl
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_ray.data.decode import DecodeLimits, Undecodable, decode, fault
from iwm_ray.data.index import Index
from iwm_ray.data.read import Reader
from iwm_ray.data.taster import deadly
from iwm_ray.errors import UsageError

_log = logging.getLogger(__name__)
_MARKS = ".making"
_READ_AT_ONCE = 256  # images in memory


@dataclass(frozen=True)
class Quarantine:
    """JSON lines: `row_id`, `path`, `reason` and `deadly` of each bad sample."""

    file: Path
    """of a run: in its directory, beside the marks; of a tuning: one for each set of images"""

    @contextlib.contextmanager
    def making(self, block: int) -> Iterator[bool]:
        """Marks a block as being made; gives whether an earlier attempt at it has died."""
        mark, died = self.file.with_name(_MARKS) / f"{block:012d}", False
        with contextlib.suppress(OSError):  # a full disk: the block is made without a mark
            mark.parent.mkdir(exist_ok=True)
            died = mark.exists()
            mark.touch()
        try:
            yield died
        finally:
            with contextlib.suppress(OSError):
                mark.unlink()

    def clear_marks(self) -> None:
        """Where a run has ended without a fault: what is left are blocks that nobody waited for."""
        shutil.rmtree(self.file.with_name(_MARKS), ignore_errors=True)

    def sift(
        self,
        index: Index,
        samples: Sequence[int],
        images: Sequence[bytes | Undecodable],
        limits: DecodeLimits,
        careful: bool,
    ) -> list[bytes | Undecodable]:
        """Takes the deadly ones out.

        Args:
            index: of the samples.
            samples: their numbers.
            images: their encoded bytes.
            limits: of the decoder.
            careful: look for deadly ones among those that are not known yet; a second and more.

        Returns:
            the images, with the reason in the place of each deadly one.
        """
        sifted, known = list(images), _known(self.file, _modified(self.file))
        if not known and not careful:
            return sifted
        row_ids = [index.row_id(sample) for sample in samples]
        for i, row_id in enumerate(row_ids):
            if row_id in known:
                sifted[i] = Undecodable(known[row_id])
        if careful:
            found = deadly(sifted, limits)
            self.add(index, [samples[i] for i in found], list(found.values()), are_deadly=True)
            for i, reason in found.items():
                sifted[i] = Undecodable(reason)
        return sifted

    def add(
        self, index: Index, samples: Sequence[int], reasons: Sequence[str], are_deadly: bool = False
    ) -> None:
        """Notes samples, each once: they come back in every epoch, and to any task on any node."""
        with self.file.open("a+") as file:
            with contextlib.suppress(OSError):  # storage without locks: a line may then stand there twice
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            if text and not text.endswith("\n"):  # whoever wrote the last line has died over it
                file.write("\n")
            known = {record["row_id"] for record in _records(text)}
            for sample, reason in zip(samples, reasons, strict=True):
                row_id = index.row_id(sample)
                if row_id not in known:
                    known.add(row_id)
                    record = {"row_id": row_id, "path": index.path(sample), "reason": reason}
                    file.write(json.dumps(record | {"deadly": are_deadly}) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """What is noted, each sample once."""
        found = _records(self.file.read_text()) if self.file.exists() else []
        return list({record["row_id"]: record for record in found}.values())

    def forget_mended(self, index: Index, limits: DecodeLimits) -> None:
        """Takes samples off that can be read again (they were mended, or their storage was away) or have left the data."""
        records, reader = self.records(), Reader(index)
        bad: list[dict[str, Any]] = []
        for first in range(0, len(records), _READ_AT_ONCE):
            bad += _still_bad(records[first : first + _READ_AT_ONCE], reader, index, limits)
        if len(bad) < len(records):
            staged = self.file.with_name(f".{self.file.name}")
            with contextlib.suppress(OSError):  # a full disk, or not ours: the note stays as it was
                staged.write_text("".join(json.dumps(record) + "\n" for record in bad))
                staged.replace(self.file)

    def note(self, index: Index, reasons: Mapping[int, str]) -> None:
        """Adds samples -> reasons, if it can: on a full disk the work is worth more than the note."""
        if not reasons:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.add(index, list(reasons), list(reasons.values()))
        except OSError as error:
            _log.warning("quarantine: %d samples not noted (%s)", len(reasons), error.strerror)


def decode_noting(
    reader: Reader,
    index: Index,
    samples: NDArray[np.int64],
    limits: DecodeLimits,
    quarantine: Quarantine | None,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Reads and decodes images, and notes those that cannot be decoded.

    Args:
        reader: of the index.
        index: of the samples.
        samples: `[k]` their numbers.
        limits: of the decoder.
        quarantine: where the others are noted; None: nowhere.

    Yields:
        place in `samples` and the image `[h w 3]`.
    """
    reasons: dict[int, str] = {}
    for place, data in enumerate(reader.read_many(samples)):
        try:
            if isinstance(data, Undecodable):
                raise data
            image = decode(data, limits)
        except Undecodable as verdict:
            reasons[int(samples[place])] = verdict.reason
            continue
        yield place, image
    if quarantine is not None:
        quarantine.note(index, reasons)


def _still_bad(
    records: Sequence[dict[str, Any]], reader: Reader, index: Index, limits: DecodeLimits
) -> list[dict[str, Any]]:
    """Those of a quarantine's records whose sample is in the data and still can't be decoded."""
    known, samples = [], []
    for record in records:
        with contextlib.suppress(UsageError):  # of other data, or removed
            samples.append(index.find(record["row_id"]))
            known.append(record)
    images = reader.read_many(samples)
    risky = [i for i, record in enumerate(known) if record.get("deadly")]
    ended = {risky[i] for i in deadly([images[i] for i in risky], limits)} if risky else set()
    return [record for i, record in enumerate(known) if i in ended or fault(images[i], limits)]


def _modified(file: Path) -> int:
    """Nanoseconds; 0 where there is no file."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=2)
def _known(file: Path, modified: int) -> dict[str, str]:
    """The deadly samples of a file as it was at a time: row id -> reason."""
    if not modified:
        return {}
    return {
        record["row_id"]: record["reason"] for record in _records(file.read_text()) if record.get("deadly")
    }


def _records(text: str) -> list[dict[str, Any]]:
    """The whole lines; a torn one is passed over."""
    records = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records
