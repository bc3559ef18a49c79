"""What an adapter says of every image of a data set, here or on a Ray cluster: classes or masks, as a Parquet file, or
masks as a folder of PNG files."""

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

import iwm_ray
from iwm_ray.config import DataConfig, RuntimeConfig, _Part
from iwm_ray.data.decode import DecodeLimits, Undecodable, decode
from iwm_ray.data.index import Index
from iwm_ray.data.read import Reader
from iwm_ray.errors import UsageError
from iwm_ray.finetuning.adapter import Classifier
from iwm_ray.output import move, partial_of
from iwm_ray.pictures.segmentation import class_colours
from iwm_ray.runtime.measure import Arrays, Progress, Work, in_order, work_device
from iwm_ray.segmentation.data import nearest
from iwm_ray.segmentation.segmenter import Segmenter
from iwm_ray.training.loop import autocast

_IMAGES_AT_ONCE = 128
_NAMES = [("row_id", pa.string()), ("path", pa.string())]
_ERROR = ("error", pa.string())
QUARANTINE = "quarantine.jsonl"
"""beside masks: row_id, path and error of each image that has none"""


class PredictConfig(_Part):
    """Which images, and where they are looked at."""

    data: DataConfig = DataConfig()
    runtime: RuntimeConfig = RuntimeConfig(engine="local")


class Answers(Protocol):
    """What is asked of a model, and how its answers become columns of a table."""

    @property
    def schema(self) -> pa.Schema:
        """Of the file. An image that cannot be decoded has nothing but row_id, path and error, the reason."""
        ...

    def ask(self, model: Any, images: torch.Tensor, shapes: list[tuple[int, int]]) -> Arrays:
        """In a worker: `[b 3 s s]` images, whose own (height, width) are `shapes`."""
        ...

    def rows(self, arrays: Arrays) -> list[dict[str, Any]]:
        """In the driver: the columns of each of these b images."""
        ...


@dataclass(frozen=True)
class Labels:
    """The likeliest classes of each image (see Answers)."""

    class_names: tuple[str, ...]
    top: int
    """how many, the likeliest first"""

    @property
    def schema(self) -> pa.Schema:
        columns = [
            ("class", pa.string()),
            ("probability", pa.float32()),
            ("top_classes", pa.list_(pa.string())),
            ("top_probabilities", pa.list_(pa.float32())),
        ]
        return pa.schema([*_NAMES, *columns, _ERROR])

    def ask(self, model: Classifier, images: torch.Tensor, shapes: list[tuple[int, int]]) -> Arrays:
        top = model.predict(images).topk(self.top, dim=1)
        return {"top": top.values.cpu().numpy(), "classes": top.indices.cpu().numpy()}

    def rows(self, arrays: Arrays) -> list[dict[str, Any]]:
        found = []
        for top, classes in zip(arrays["top"], arrays["classes"], strict=True):
            names = [self.class_names[place] for place in classes]
            found.append({"class": names[0], "probability": top[0]})
            found[-1] |= {"top_classes": names, "top_probabilities": top}
        return found


@dataclass(frozen=True)
class Masks:
    """The class of every pixel of each image, at the image's own size (see Answers)."""

    class_names: tuple[str, ...]

    @property
    def schema(self) -> pa.Schema:
        """`mask`: an index PNG, whose values are numbers of classes; `classes`: those that are seen, the largest first."""
        columns = [
            ("mask", pa.binary()),
            ("classes", pa.list_(pa.string())),
            ("shares", pa.list_(pa.float32())),
        ]
        return pa.schema([*_NAMES, *columns, _ERROR])

    def ask(self, model: Segmenter, images: torch.Tensor, shapes: list[tuple[int, int]]) -> Arrays:
        predicted = model.predict(images).cpu().numpy().astype(np.uint8)
        count = len(self.class_names)
        shares = np.stack([np.bincount(each.ravel(), minlength=count) / each.size for each in predicted])
        files = [self._png(each, shape) for each, shape in zip(predicted, shapes, strict=True)]
        lengths = np.array([len(file) for file in files])
        return {"files": np.frombuffer(b"".join(files), np.uint8), "lengths": lengths, "shares": shares}

    def rows(self, arrays: Arrays) -> list[dict[str, Any]]:
        files, ends = arrays["files"].tobytes(), np.cumsum(arrays["lengths"])
        found = []
        for end, length, shares in zip(ends, arrays["lengths"], arrays["shares"], strict=True):
            seen = [int(place) for place in np.argsort(-shares, kind="stable") if shares[place]]
            names = {"classes": [self.class_names[place] for place in seen], "shares": shares[seen]}
            found.append({"mask": files[end - length : end]} | names)
        return found

    def _png(self, mask: NDArray[np.uint8], shape: tuple[int, int]) -> bytes:
        picture = Image.fromarray(nearest(mask, *shape)).convert("P")
        picture.putpalette(class_colours(len(self.class_names)).tobytes())
        file = io.BytesIO()
        picture.save(file, "PNG")
        return file.getvalue()


@dataclass(frozen=True)
class Predictor:
    """What a worker needs; called, it gives the function from sample numbers to what is said of them."""

    adapter: Path
    task: str
    """"": the only one"""
    run: Path | None
    """where the run directory of its encoder has moved"""
    answers: Answers
    index: Index
    limits: DecodeLimits
    runtime: RuntimeConfig

    def __call__(self) -> Work:
        model, reader = iwm_ray.load(self.adapter, self.task, self.run), Reader(self.index)
        device = work_device(self.runtime)
        model.tuned.to(device)

        def predict(samples: NDArray[np.int64]) -> Arrays:
            images, shapes, found, reasons = _read(reader, samples, self.limits, model)
            arrays = {"reasons": np.frombuffer(json.dumps(reasons).encode(), np.uint8)}
            if not found:
                return arrays
            with autocast(self.runtime, device):
                said = self.answers.ask(model, torch.stack(images), shapes)
                return arrays | said | {"samples": samples[found]}

        return predict

    def rows(self, progress: Progress | None = None) -> Iterator[pa.Table]:
        """Tables of `answers.schema`, together one row for each image, in the order of the index."""
        numbers = np.arange(len(self.index))
        parts = [
            numbers[first : first + _IMAGES_AT_ONCE] for first in range(0, len(numbers), _IMAGES_AT_ONCE)
        ]
        with closing(in_order(self, parts, self.runtime, progress)) as results:
            for part, arrays in zip(parts, results, strict=True):
                yield self._table(part, arrays)

    def _table(self, samples: NDArray[np.int64], arrays: Arrays) -> pa.Table:
        reasons = json.loads(arrays["reasons"].tobytes())
        rows: dict[int, dict[str, Any]] = {int(sample): {"error": reason} for sample, reason in reasons}
        if "samples" in arrays:
            rows |= zip(map(int, arrays["samples"]), self.answers.rows(arrays), strict=True)
        whole = [
            {"row_id": self.index.row_id(sample), "path": self.index.path(sample)} | rows[sample]
            for sample in map(int, samples)
        ]
        return pa.Table.from_pylist(whole, self.answers.schema)


def _read(
    reader: Reader, samples: NDArray[np.int64], limits: DecodeLimits, model: Classifier | Segmenter
) -> tuple[list[torch.Tensor], list[tuple[int, int]], list[int], list[tuple[int, str]]]:
    """Images `[3 s s]` that fit the model, the (height, width) that they had, their places in `samples`, and
    (sample, reason) of what cannot be decoded."""
    images, shapes, found, reasons = [], [], [], []
    for place, data in enumerate(reader.read_many(samples)):
        try:
            if isinstance(data, Undecodable):
                raise data
            image = decode(data, limits)
            images.append(model.fit(image))
            shapes.append((image.shape[0], image.shape[1]))
            found.append(place)
        except Undecodable as failure:
            reasons.append((int(samples[place]), failure.reason))
    return images, shapes, found, reasons


@dataclass
class Written:
    """How many images there are."""

    images: int = 0
    unreadable: int = 0

    def add(self, table: pa.Table) -> None:
        self.images += len(table)
        self.unreadable += len(table) - table["error"].null_count


def write(tables: Iterator[pa.Table], schema: pa.Schema, path: Path) -> Written:
    """Writes tables one after the other; the file gets its name when all is written."""
    written, partial = Written(), partial_of(path)
    try:
        with pq.ParquetWriter(partial, schema) as writer:
            for table in tables:
                writer.write_table(table)
                written.add(table)
        move(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return written


def write_masks(tables: Iterator[pa.Table], folder: Path) -> Written:
    """Writes the masks of tables as PNG files, named like their images, and QUARANTINE where there are images that
    cannot be decoded; the folder gets its name when all is written.

    Raises:
        UsageError: two images would have the same mask.
    """
    written, partial = Written(), partial_of(folder)
    bad: list[dict[str, str]] = []
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        for table in tables:
            written.add(table)
            for row in table.to_pylist():
                if row["mask"] is not None:
                    _write_new(partial / mask_name(row["row_id"]), row["mask"], row["path"])
                else:
                    bad.append({name: row[name] for name in ("row_id", "path", "error")})
        if bad:
            (partial / QUARANTINE).write_text("".join(f"{json.dumps(row)}\n" for row in bad))
        move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return written


def mask_name(row_id: str) -> Path:
    """Where the mask of an image lies below its folder: the same name, with .png."""
    parts = [part for part in row_id.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return Path(*parts).with_suffix(".png")


def _write_new(path: Path, content: bytes, image: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        raise UsageError(
            f"--output: {image} and another image would both have the mask {path.name}; give a .parquet file"
        ) from None
