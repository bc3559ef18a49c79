"""The index: which samples exist, in a fixed order, and where their bytes lie.

It is one Arrow file in the cache, memory-mapped, so that opening it takes a millisecond at any size and every
worker on a machine shares the same pages. The folder is named by a fingerprint of the source (names, sizes,
modification times), is built under another name and moved into place, and never changes afterwards: two
processes may build it at once, and a run keeps its index when the data changes.

    cache/<fingerprint>/index.arrow    one row per sample cache/<fingerprint>/images.bin     the cells of
    Parquet files, one after another cache/sources/<name>.json          which fingerprint a large local folder
    had, and the mtimes of its folders
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from iwm_ray.config import DataConfig
from iwm_ray.data.listing import Listing, Location, Progress, list_data, nothing_usable
from iwm_ray.data.photos import PHOTOS_TINY, photos_tiny
from iwm_ray.data.sources import Rows, scan
from iwm_ray.errors import UsageError

_FORMAT = 1
_METADATA_KEY = b"iwm_ray"
# Listing this many files takes about 20 ms; above it the mtimes of the folders are trusted instead.
_RELIST_FILES = 5_000
# A folder changed so shortly before it was read may change again without a new mtime.
_SETTLED_NANOSECONDS = 2_000_000_000
_INLINE_BYTES = 1 << 20


@dataclass(frozen=True)
class _Facts:
    """What the index knows besides its rows; kept as JSON in the Arrow file."""

    kind: str
    uri: str
    """names the filesystem; "" for local files"""
    root: str
    """local path, or path inside the filesystem"""
    shards: list[str]
    """names relative to the root"""
    class_names: list[str]
    skipped: int
    hash: str
    packed_bytes: int
    """size of images.bin"""


class Index:
    """The samples of one data set. Immutable; a small index is pickled whole, a large one as its path."""

    def __init__(self, directory: Path, batch: pa.RecordBatch) -> None:
        """Wraps what lies in `directory`; use `Index.open`."""
        self._directory = directory
        self._batch = batch
        self._facts = _Facts(**json.loads(batch.schema.metadata[_METADATA_KEY]))
        self._row_ids = batch.column("row_id")
        self._raw_names = batch.column("raw_name")
        self._shards: NDArray[np.int32] = batch.column("shard").to_numpy()
        self._offsets: NDArray[np.int64] = batch.column("offset").to_numpy()
        self.labels: NDArray[np.int32] = batch.column("label").to_numpy()
        """`[n]` class numbers; -1: no label"""
        self.sizes: NDArray[np.int64] = batch.column("size").to_numpy()
        """`[n]` encoded bytes when the index was made; 0: an empty file or a null cell"""

    @classmethod
    def open(cls, data: DataConfig, path: str, cache: Path, progress: Progress | None = None) -> "Index":
        """Opens the index of a data set; makes it first if the cache has none for these files.

        A local tree of more than 5,000 images is not listed again while none of its folders has a new
        modification time: added, removed and renamed files are seen, files overwritten in place are not.

        Args:
            data: names of the Parquet columns.
            path: `data.path` or `data.test_path`: a folder, Parquet file(s), tar shard(s), a pattern of
                these, local or a
                URI; `photos_tiny` and `photos_tiny:test` are the two parts of the built-in photographs.
            cache: folder for indices; shared by all nodes of a cluster.
            progress: called with the number of samples found so far.

        Raises:
            UsageError: nothing usable there, a damaged shard, a missing column, a cache that cannot be
            written.
        """
        cache = cache.expanduser()
        setting = "data.test_path" if path == data.test_path != data.path else "data.path"
        if path in (PHOTOS_TINY, f"{PHOTOS_TINY}:test"):
            path = str(photos_tiny(cache)[path != PHOTOS_TINY])
        location = Location.parse(setting, path)
        name = _fingerprint_of_settings(location, data)
        known = _recall(cache, name)
        if known is not None:
            return known
        started = time.time_ns()
        listing = list_data(location, progress)
        fingerprint = _fingerprint(name, listing)
        index = _load(cache / fingerprint)
        if index is None:
            index = _build(listing, data, cache / fingerprint, progress)
        _remember(cache, name, fingerprint, listing, started)
        return index

    @classmethod
    def load(cls, directory: str | Path) -> "Index":
        """The index in a folder of the cache."""
        index = _load(Path(directory))
        if index is None:
            raise UsageError(
                f"runtime.cache: no index in {directory}; several nodes need a cache on shared storage"
            )
        return index

    @classmethod
    def _from_bytes(cls, directory: str, content: bytes) -> "Index":
        return cls(Path(directory), pa.ipc.open_file(pa.py_buffer(content)).get_batch(0))

    def __reduce__(self) -> tuple[Any, ...]:
        file = self._directory / "index.arrow"
        if file.stat().st_size <= _INLINE_BYTES:
            return Index._from_bytes, (str(self._directory), file.read_bytes())
        return Index.load, (str(self._directory),)

    def __eq__(self, other: object) -> bool:
        """Copies of one index are equal: the cache names it by its content."""
        return isinstance(other, Index) and other._directory == self._directory

    def __hash__(self) -> int:
        return hash(self._directory)

    def __len__(self) -> int:
        return len(self._batch)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class number."""
        return tuple(self._facts.class_names)

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits of row ids, labels, classes and sizes; not of where they lie."""
        return self._facts.hash

    @property
    def skipped(self) -> int:
        """Files and members passed over: other extensions, hidden, links to nowhere."""
        return self._facts.skipped

    @property
    def uri(self) -> str:
        """What names the remote filesystem; "" for local files."""
        return self._facts.uri

    @property
    def is_packed(self) -> bool:
        """Whether the bytes lie in the cache (Parquet), not at the source."""
        return self._facts.kind == "parquet"

    def row_id(self, i: int) -> str:
        """The sample's stable name: path below the root, Parquet row id or `file:row`, `shard/member`."""
        return self._row_ids[i].as_py()

    def find(self, row_id: str) -> int:
        """The sample with this row id. Raises UsageError where there is none."""
        i = pc.index(self._row_ids, row_id).as_py()
        if i < 0:
            raise UsageError(f"row id '{row_id}' is not in the data; row ids look like '{self.row_id(0)}'")
        return i

    def path(self, i: int) -> str:
        """The file or URI in which the user finds the sample (a Parquet file, not its copy in the cache)."""
        if self._facts.kind == "images":
            return f"{self._root}/{self.row_id(i)}"
        return f"{self._root}/{self._facts.shards[self._shards[i]]}"

    def origin(self, i: int) -> tuple[str, int]:
        """The file or URI of the sample, and where it is in there: its row (Parquet) or first byte (tar), else 0."""
        if self.is_packed:
            return self.path(i), i - int(np.searchsorted(self._shards, self._shards[i]))
        return self.path(i), int(self._offsets[i])

    def place(self, i: int) -> tuple[str, int, int]:
        """(path to open, offset, size in bytes); size -1: the whole file."""
        if self._facts.kind == "images":
            raw = self._raw_names[i].as_py()
            return f"{self._facts.root}/{self.row_id(i) if raw is None else os.fsdecode(raw)}", 0, -1
        if self._facts.kind == "parquet":
            return str(self._directory / "images.bin"), int(self._offsets[i]), int(self.sizes[i])
        shard = self._facts.shards[self._shards[i]]
        return f"{self._facts.root}/{shard}", int(self._offsets[i]), int(self.sizes[i])

    def labels_in(self, class_names: Sequence[str]) -> NDArray[np.int32]:
        """`[n]` int32: labels in the numbers of another data set's classes, -1 for a class that it lacks."""
        numbers = {name: number for number, name in enumerate(class_names)}
        translation = np.array([*(numbers.get(name, -1) for name in self.class_names), -1], np.int32)
        return translation[self.labels]

    @property
    def source(self) -> str:
        """The local folder or file, or the URI, that holds all samples."""
        shards = self._facts.shards
        below = os.path.commonpath(shards) if shards else ""
        return f"{self._root}/{below}".rstrip("/")

    @property
    def _root(self) -> str:
        scheme = self._facts.uri.partition("://")[0]
        return f"{scheme}://{self._facts.root}" if scheme else self._facts.root


# The cache


def _fingerprint_of_settings(location: Location, data: DataConfig) -> str:
    """Names what is read and how, before looking at it."""
    settings = [
        _FORMAT,
        location.uri if location.filesystem else location.path,
        data.image_column,
        data.label_column,
    ]
    return _digest(json.dumps(settings).encode())


def _fingerprint(name: str, listing: Listing) -> str:
    """Names the state of the source: every name, size and modification time."""
    parts = [name.encode(), listing.kind.encode()]
    for folder in listing.folders:
        parts += [
            folder.name.encode(),
            _text_bytes(folder.row_ids),
            folder.sizes.tobytes(),
            folder.mtimes.tobytes(),
        ]
    parts += [json.dumps([(shard.name, shard.size, shard.mtime) for shard in listing.shards]).encode()]
    return _digest(*parts)


def _content_hash(rows: Rows) -> str:
    names = json.dumps(rows.class_names).encode()
    return _digest(names, _text_bytes(rows.row_ids), rows.labels.tobytes(), rows.sizes.tobytes())


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _text_bytes(texts: pa.LargeStringArray) -> bytes:
    """Lengths and characters, without a Python object for each text."""
    _, offsets, characters = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return np.diff(ends).tobytes() + memoryview(characters or b"")[ends[0] : ends[-1]].tobytes()


def _load(directory: Path) -> Index | None:
    """The index in `directory`; None where there is none or a damaged one."""
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(directory / "index.arrow"))).get_batch(0)
        index = Index(directory, batch)
        packed = index._facts.packed_bytes
        return index if packed == 0 or os.path.getsize(directory / "images.bin") == packed else None
    except (OSError, pa.ArrowInvalid):
        return None


def _build(listing: Listing, data: DataConfig, directory: Path, progress: Progress | None) -> Index:
    cache = directory.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".building-", dir=cache, ignore_cleanup_errors=True
        ) as staging:
            _write(listing, data, Path(staging), progress)
            _move_into_place(Path(staging), directory)
    except OSError as error:
        raise UsageError(f"runtime.cache {cache}: {error.strerror}; give --runtime.cache DIR") from None
    return Index.load(directory)


def _move_into_place(staging: Path, directory: Path) -> None:
    """Gives a finished index its name, unless another process was faster; a damaged one makes room."""
    try:
        os.rename(staging, directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if _load(directory) is None:
            shutil.rmtree(directory)
            os.rename(staging, directory)


def _write(listing: Listing, data: DataConfig, directory: Path, progress: Progress | None) -> None:
    """Writes both files of the index into `directory`."""
    packed_path = directory / "images.bin"
    with open(packed_path, "wb") as packed:
        rows = scan(listing, data, packed, progress)
        packed_bytes = packed.tell()
        packed.flush()
        os.fsync(packed.fileno())
    if packed_bytes == 0:
        packed_path.unlink()
    if not len(rows.row_ids):
        raise nothing_usable(listing.root, listing.skipped + rows.skipped)
    facts = _Facts(
        kind=listing.kind,
        uri=listing.root.uri if listing.root.filesystem else "",
        root=listing.root.path,
        shards=[shard.name for shard in listing.shards],
        class_names=list(rows.class_names),
        skipped=listing.skipped + rows.skipped,
        hash=_content_hash(rows),
        packed_bytes=packed_bytes,
    )
    columns = {
        "row_id": rows.row_ids,
        "raw_name": rows.raw_names,
        "label": rows.labels,
        "shard": rows.shards,
        "offset": rows.offsets,
        "size": rows.sizes,
    }
    batch = pa.RecordBatch.from_pydict(columns, metadata={_METADATA_KEY: json.dumps(asdict(facts)).encode()})
    with open(directory / "index.arrow", "wb") as file:
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())


# Large local folders, recognised without listing them


def _recall(cache: Path, name: str) -> Index | None:
    """The index of a large folder none of whose subfolders has changed since it was listed."""
    try:
        known = json.loads((cache / "sources" / f"{name}.json").read_text())
        if any(os.stat(path).st_mtime_ns != mtime for path, mtime in known["directories"]):
            return None
    except (OSError, ValueError):
        return None
    return _load(cache / known["fingerprint"])


def _remember(cache: Path, name: str, fingerprint: str, listing: Listing, started: int) -> None:
    num_files = sum(len(folder.sizes) for folder in listing.folders)
    newest = max((mtime for _, mtime in listing.directories), default=0)
    if num_files <= _RELIST_FILES or not listing.directories or newest > started - _SETTLED_NANOSECONDS:
        return
    folder = cache / "sources"
    staging = folder / f"{name}.{os.getpid()}.tmp"
    with contextlib.suppress(OSError):  # a cache that is only readable: the next run lists the files again
        folder.mkdir(exist_ok=True)
        staging.write_text(json.dumps({"fingerprint": fingerprint, "directories": listing.directories}))
        os.replace(staging, folder / f"{name}.json")
