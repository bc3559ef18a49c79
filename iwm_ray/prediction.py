"""An adapter's classes for every image of a data set, here or on a Ray cluster, as rows of a Parquet file."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from iwm_ray.config import DataConfig, RuntimeConfig, _Part
from iwm_ray.data.decode import DecodeLimits, Undecodable, decode
from iwm_ray.data.index import Index
from iwm_ray.data.read import Reader
from iwm_ray.finetuning import adapter
from iwm_ray.runtime.measure import Arrays, Progress, Work, in_order, work_device
from iwm_ray.training.loop import autocast
from iwm_ray.views.resize import clean_view

_IMAGES_AT_ONCE = 128

SCHEMA = pa.schema([
    ("row_id", pa.string()),
    ("path", pa.string()),
    ("class", pa.string()),
    ("probability", pa.float32()),
    ("top_classes", pa.list_(pa.string())),
    ("top_probabilities", pa.list_(pa.float32())),
    ("error", pa.string()),
])  # fmt: skip
"""Of the file. An image that cannot be decoded has nothing but row_id, path and error, the reason."""


class PredictConfig(_Part):
    """Which images, and where they are classified."""

    data: DataConfig = DataConfig()
    runtime: RuntimeConfig = RuntimeConfig(engine="local")


@dataclass(frozen=True)
class Predictor:
    """What a worker needs; called, it gives the function from sample numbers to their classes."""

    adapter: Path
    task: str
    """"": the only one"""
    index: Index
    limits: DecodeLimits
    runtime: RuntimeConfig
    top: int
    """how many classes of each image, the likeliest first"""

    def __call__(self) -> Work:
        classifier, reader = adapter.load(self.adapter, self.task), Reader(self.index)
        device = work_device(self.runtime)
        classifier.tuned.to(device)
        size = classifier.image_size

        def predict(samples: NDArray[np.int64]) -> Arrays:
            images, found, reasons = _read(reader, samples, self.limits, size)
            arrays = {"reasons": np.frombuffer(json.dumps(reasons).encode(), np.uint8)}
            if not found:
                return arrays
            with autocast(self.runtime, device):
                probabilities = classifier.predict(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
            top = probabilities.topk(self.top, dim=1)
            named = {"top": top.values.cpu().numpy(), "classes": top.indices.cpu().numpy()}
            return arrays | named | {"samples": samples[found]}

        return predict

    def rows(self, class_names: tuple[str, ...], progress: Progress | None = None) -> Iterator[pa.Table]:
        """Tables of `SCHEMA`, together one row for each image, in the order of the index."""
        numbers = np.arange(len(self.index))
        parts = [
            numbers[first : first + _IMAGES_AT_ONCE] for first in range(0, len(numbers), _IMAGES_AT_ONCE)
        ]
        with closing(in_order(self, parts, self.runtime, progress)) as results:
            for part, arrays in zip(parts, results, strict=True):
                yield self._table(part, arrays, class_names)

    def _table(self, samples: NDArray[np.int64], arrays: Arrays, class_names: tuple[str, ...]) -> pa.Table:
        reasons = json.loads(arrays["reasons"].tobytes())
        rows: dict[int, dict[str, Any]] = {int(sample): {"error": reason} for sample, reason in reasons}
        if "samples" in arrays:
            for sample, top, classes in zip(*(arrays[n] for n in ("samples", "top", "classes")), strict=True):
                names = [class_names[place] for place in classes]
                rows[int(sample)] = {
                    "class": names[0],
                    "probability": top[0],
                    "top_classes": names,
                    "top_probabilities": top,
                }
        whole = [
            {"row_id": self.index.row_id(sample), "path": self.index.path(sample)} | rows[sample]
            for sample in map(int, samples)
        ]
        return pa.Table.from_pylist(whole, SCHEMA)


def _read(
    reader: Reader, samples: NDArray[np.int64], limits: DecodeLimits, size: int
) -> tuple[list[NDArray[np.uint8]], list[int], list[tuple[int, str]]]:
    """Clean views `[size size 3]`, their places in `samples`, and (sample, reason) of what cannot be decoded."""
    images, found, reasons = [], [], []
    for place, data in enumerate(reader.read_many(samples)):
        try:
            if isinstance(data, Undecodable):
                raise data
            images.append(clean_view(decode(data, limits), size))
            found.append(place)
        except Undecodable as failure:
            reasons.append((int(samples[place]), failure.reason))
    return images, found, reasons


@dataclass
class Written:
    """How many images a file has."""

    images: int = 0
    unreadable: int = 0


def write(tables: Iterator[pa.Table], path: Path) -> Written:
    """Writes tables one after the other; the file gets its name when all is written."""
    written, partial = Written(), path.with_name(f".{path.name}.partial")
    try:
        with pq.ParquetWriter(partial, SCHEMA) as writer:
            for table in tables:
                writer.write_table(table)
                written.images += len(table)
                written.unreadable += table["class"].null_count
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return written
