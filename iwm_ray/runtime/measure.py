"""Measuring many images with a frozen model: part by part, in order, here or on a Ray cluster; features are kept.

A part is what a worker computes at a time, so results don't depend on how many workers there are.
"""

import copy
import errno
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save

from iwm_ray.config import RuntimeConfig
from iwm_ray.data.decode import DecodeLimits, Undecodable, decode, fault
from iwm_ray.data.index import Index
from iwm_ray.data.read import Reader, content_hash
from iwm_ray.errors import RunError, UsageError
from iwm_ray.evaluation.encoders import LAST, FrozenEncoder, TokenModel
from iwm_ray.evaluation.features import Features, digest, measuring
from iwm_ray.training.loop import autocast, uses_bfloat16
from iwm_ray.views.resize import CLEAN_VIEW

Arrays = dict[str, NDArray[Any]]
Work = Callable[[Any], Arrays]
"""what a worker does with one part"""
Progress = Callable[[int, int], None]
"""gets how many are done, and of how many"""

_IMAGES_AT_ONCE = 128
# A worker whose process dies (no memory, a lost node) is replaced this often; Ray's default is for ever.
_RETRIES = 3
_SPARE = 1.05  # of the disk, beside the features
_VALUES, _SAMPLES = "values.npy", "samples.npy"


def in_order(
    make: Callable[[], Work],
    parts: Sequence[Any],
    runtime: RuntimeConfig,
    progress: Progress | None = None,
) -> Generator[Arrays, None, None]:
    """Applies a function to every part; the results come in the order of the parts.

    Args:
        make: called once in each worker, gives the function; it must be picklable, and choose the worker's device
            by `work_device`.
        parts: each small and picklable.
        runtime: `engine` local: in this process; ray: by `num_workers` actors of the cluster to which this process
            is connected, each with `cpus_per_worker` and, with `use_gpu`, one GPU.
        progress: called with the number of finished parts and of all, before a result is given out.

    Raises:
        UsageError, RunError: as the function or `make` raised it; RunError where a worker died several times.
    """
    results = _on_ray(make, parts, runtime) if runtime.engine == "ray" else _here(make, parts)
    if not parts:
        return
    with closing(results):
        for done, result in enumerate(results, start=1):
            if progress is not None:
                progress(done, len(parts))
            yield result


def work_device(runtime: RuntimeConfig) -> torch.device:
    """Where a worker computes; Ray shows each worker no GPU but its own."""
    return torch.device("cuda" if runtime.use_gpu else "cpu")


def extract(
    encoder: FrozenEncoder,
    index: Index,
    samples: NDArray[np.int64],
    *,
    runtime: RuntimeConfig,
    limits: DecodeLimits,
    cache: Path,
    pooled: bool = True,
    layers: Sequence[int] = (LAST,),
    progress: Progress | None = None,
) -> dict[int, Features]:
    """Features of images, from the cache where it has them; then no model is loaded and nothing is started.

    Args:
        encoder: what makes them.
        index: where the images come from.
        samples: `[k]` sample numbers in `index`.
        runtime: see `in_order`; `precision` is that of the encoder's forward pass.
        limits: of the decoder.
        cache: features are kept in its folder `features`.
        pooled: the mean over the tokens, `[k d]` float32; otherwise all tokens, `[k n d]` float16.
        layers: which of the encoder's layers (encoders.LAST: its output).
        progress: called with the number of images done and of all.

    Returns:
        for each layer the features in the order of `samples`, memory-mapped; what can't be decoded is left out.

    Raises:
        UsageError: no room for the features, or no such layer.
        RunError: no image could be read, or features are not finite.
    """
    make = _Extraction(encoder, index, runtime, limits, pooled, tuple(layers))
    kept = cache.expanduser().absolute() / "features"
    folders = {layer: kept / _name(make, samples, layer) for layer in layers}
    missing = {layer: folder for layer, folder in folders.items() if not _is_whole(folder)}
    if missing:
        parts = [
            samples[first : first + _IMAGES_AT_ONCE] for first in range(0, len(samples), _IMAGES_AT_ONCE)
        ]
        by_image = _counting_images(progress, len(samples)) if progress else None
        with closing(in_order(replace(make, layers=tuple(missing)), parts, runtime, by_image)) as results:
            _keep(results, missing, samples, make)
    return {layer: _open(folder, index, len(samples)) for layer, folder in folders.items()}


# Parts


def _here(make: Callable[[], Work], parts: Sequence[Any]) -> Generator[Arrays, None, None]:
    work = make()
    for part in parts:
        yield work(part)


def _on_ray(
    make: Callable[[], Work], parts: Sequence[Any], runtime: RuntimeConfig
) -> Generator[Arrays, None, None]:
    import ray.data  # not above: features can be measured where Ray is not installed
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.util.annotations import RayDeprecationWarning

    with (
        ray.data.DataContext.current(_context(ray.data.DataContext.get_current())),
        warnings.catch_warnings(),
    ):
        # Ray 2.60 deprecates the one way to say how often a worker is replaced, and names no other.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        # Blocks that lie there already: tasks that read them would wait for ever where the actors hold all CPUs.
        numbers = ray.data.from_arrow([pa.table({"number": [number]}) for number in range(len(parts))])
        results = numbers.map_batches(
            _Actor,
            fn_constructor_args=(make, ray.put(parts)),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(runtime.num_workers, len(parts))),
            num_cpus=runtime.cpus_per_worker,
            num_gpus=1 if runtime.use_gpu else 0,
            max_restarts=_RETRIES,
            max_task_retries=_RETRIES,
        )
    try:
        for row in results.iter_batches(batch_size=1, batch_format="pyarrow"):
            yield _unpacked(row)
    except (RayActorError, OutOfMemoryError):
        raise RunError(
            f"a measuring worker died {_RETRIES + 1} times, perhaps for lack of memory; give fewer "
            "--runtime.num-workers"
        ) from None


class _Actor:
    """A worker on the cluster. What the user can mend travels as a result, since Ray would wrap it in its own errors."""

    def __init__(self, make: Callable[[], Work], parts: Any) -> None:
        import ray

        self._make, self._parts = make, ray.get(parts)
        self._work: Work | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        try:
            self._work = self._work or self._make()
            result, error, kind = save(self._work(self._parts[batch["number"][0].as_py()])), "", ""
        except (UsageError, RunError) as failure:
            result, error, kind = b"", str(failure), "usage" if isinstance(failure, UsageError) else "run"
        arrays = pa.array([result], pa.large_binary())
        return pa.table({"arrays": arrays, "error": [error], "kind": [kind]})


def _unpacked(row: pa.Table) -> Arrays:
    if row["kind"][0].as_py():
        raise {"usage": UsageError, "run": RunError}[row["kind"][0].as_py()](row["error"][0].as_py())
    return load(row["arrays"][0].as_py())


def _context(context: Any) -> Any:
    """Ray Data's settings for measuring alone: quiet, and in the order of the parts."""
    context = copy.deepcopy(context)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    return context


# Features


@dataclass(frozen=True)
class _Extraction:
    """What a worker needs to make features; called, it gives the function from sample numbers to features."""

    encoder: FrozenEncoder
    index: Index
    runtime: RuntimeConfig
    limits: DecodeLimits
    pooled: bool
    layers: tuple[int, ...]

    def __call__(self) -> Work:
        model, reader = self.encoder.load().to(work_device(self.runtime)), Reader(self.index)
        return lambda samples: self._features(model, reader, samples)

    def _features(self, model: TokenModel, reader: Reader, samples: NDArray[np.int64]) -> Arrays:
        """`[b]` sample numbers -> the readable ones as `samples`, and their features by the layer's number."""
        images = self._read(reader, samples)
        found = [number for number, image in enumerate(images) if image is not None]
        if not found:
            return {"samples": samples[:0]}
        device = work_device(self.runtime)
        pixels = np.stack([image for image in images if image is not None]).transpose(0, 3, 1, 2)
        with measuring(model), autocast(self.runtime, device):
            tokens = model.tokens(torch.from_numpy(pixels).to(device), self.layers)
        features = [each.float().mean(1) if self.pooled else each.half() for each in tokens]
        if not all(bool(each.isfinite().all()) for each in features):
            raise RunError(f"features of {self.encoder.name} are not finite; choose another checkpoint")
        arrays = {str(layer): each.cpu().numpy() for layer, each in zip(self.layers, features, strict=True)}
        return {"samples": samples[found]} | arrays

    def _read(self, reader: Reader, samples: NDArray[np.int64]) -> list[NDArray[np.uint8] | None]:
        """`[s s 3]` clean views; None where an image can't be decoded."""

        def clean(data: bytes | Undecodable) -> NDArray[np.uint8] | None:
            if isinstance(data, Undecodable):
                return None
            with suppress(Undecodable):
                return self.encoder.view(decode(data, self.limits))
            return None

        with ThreadPoolExecutor(max(1, int(self.runtime.cpus_per_worker))) as threads:
            return list(threads.map(clean, reader.read_many(samples)))


def _name(extraction: _Extraction, samples: NDArray[np.int64], layer: int) -> str:
    """Of the folder of one layer's features: whatever decides them."""
    precision = "bf16" if uses_bfloat16(extraction.runtime, work_device(extraction.runtime)) else "fp32"
    encoder, limits = extraction.encoder, asdict(extraction.limits)
    transform = [CLEAN_VIEW, encoder.image_size, limits, precision, extraction.pooled, layer]
    return digest(encoder.hash, content_hash(extraction.index), samples.tobytes(), transform)


def _keep(
    results: Iterator[Arrays], folders: Mapping[int, Path], samples: NDArray[np.int64], make: _Extraction
) -> None:
    """Streams the features of each layer into its folder; the folders get their names when all is written."""
    parent = next(iter(folders.values())).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".building-", dir=parent, ignore_cleanup_errors=True
        ) as staging:
            staged = {layer: Path(staging, folder.name) for layer, folder in folders.items()}
            if not _write(results, staged, len(samples)):
                raise RunError(_nothing_read(make, samples))
            for layer, folder in folders.items():
                _move(staged[layer], folder)
    except OSError as error:
        raise UsageError(
            f"runtime.cache {parent.parent}: {error.strerror}; give --runtime.cache DIR"
        ) from None


def _nothing_read(make: _Extraction, samples: NDArray[np.int64]) -> str:
    """What is said where no image could be read."""
    index, first = make.index, samples[:1]
    reason = fault(Reader(index).read_many(first)[0], make.limits)
    return (
        f"none of the {len(samples)} images of {index.source} that were chosen could be read, e.g. "
        f"{index.row_id(int(first[0]))}: {reason}; give other images"
    )


def _write(results: Iterator[Arrays], folders: Mapping[int, Path], count: int) -> bool:
    """Whether there were any features."""
    with ExitStack() as files:
        values: dict[int, _Rows] = {}
        samples = []
        for result in results:
            samples.append(result["samples"])
            if not len(result["samples"]):
                continue
            if not values:
                _check_room(folders, result, count)
            for layer, folder in folders.items():
                if layer not in values:
                    folder.mkdir()
                    values[layer] = files.enter_context(_Rows(folder / _VALUES))
                values[layer].append(result[str(layer)])
    if values:
        for folder in folders.values():
            np.save(folder / _SAMPLES, np.concatenate(samples))
    return bool(values)


def _check_room(folders: Mapping[int, Path], result: Arrays, count: int) -> None:
    """Raises UsageError where `count` images like those of this result don't fit on the disk."""
    cache = next(iter(folders.values())).parents[2]
    image_bytes = sum(result[str(layer)][0].nbytes for layer in folders)
    free, needed = shutil.disk_usage(cache).free, count * image_bytes
    if needed * _SPARE > free:
        raise UsageError(
            f"runtime.cache {cache}: features of {count} images need {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are "
            "free; measure on fewer images, or give another --runtime.cache DIR"
        )


class _Rows:
    """A .npy file whose number of rows is known at its end; numpy leaves room for it in the header."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._count = 0
        self._like: NDArray[Any] | None = None

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            if self._like is not None:
                self._file.seek(0)
                self._write_header(self._like)

    def append(self, rows: NDArray[Any]) -> None:
        if self._like is None:
            self._like = rows[:0]
            self._write_header(self._like)
        self._file.write(np.ascontiguousarray(rows).data)
        self._count += len(rows)

    def _write_header(self, like: NDArray[Any]) -> None:
        shape = (self._count, *like.shape[1:])
        header = {"descr": like.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


def _move(staged: Path, folder: Path) -> None:
    """Gives finished features their name, unless another process was faster; damaged ones make room."""
    try:
        os.rename(staged, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _is_whole(folder):
            shutil.rmtree(folder)
            os.rename(staged, folder)


def _is_whole(folder: Path) -> bool:
    """Whether features are there, and as many as their samples: files that were cut off cannot be read."""
    try:
        samples, values = np.load(folder / _SAMPLES), np.load(folder / _VALUES, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return len(samples) == len(values)


def _open(folder: Path, index: Index, count: int) -> Features:
    samples = np.load(folder / _SAMPLES)
    values = np.load(folder / _VALUES, mmap_mode="r")
    labels = index.labels[samples].astype(np.int64)
    return Features(values, labels, samples, index.class_names, folder.name, count - len(samples))


def _counting_images(progress: Progress, count: int) -> Progress:
    return lambda done, _: progress(min(done * _IMAGES_AT_ONCE, count), count)
