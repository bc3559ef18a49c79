"""Encoded bytes of samples, by number, from local files or a remote filesystem."""

import functools
import hashlib
import os
import stat
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow.fs

from iwm_ray.data import listing
from iwm_ray.data.decode import Undecodable
from iwm_ray.data.index import Index
from iwm_ray.data.sources import MAX_SAMPLE_BYTES
from iwm_ray.errors import RunError

_NUM_HANDLES = 64
_NUM_HASHED = 64  # samples
_NUM_REMOTE_READERS = 16
# A network file system may stumble; a sample that was set aside for it would change the run.
_RETRY_SECONDS = (0.1, 1.0, 5.0)
_HOPELESS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Reader:
    """Reads samples of an index; safe to share between threads, cheap to pickle.

    Local bytes come by `pread`, not through a memory map: the map of a file that somebody cuts short ends the
    process.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._local_file = functools.lru_cache(_NUM_HANDLES)(_LocalFile)

    def __reduce__(self) -> tuple[Any, ...]:
        return Reader, (self._index,)

    def read(self, i: int) -> bytes:
        """The encoded bytes of sample `i`; empty for an empty file or a null cell.

        Raises:
            Undecodable: the file is gone, forbidden, changed or too large, or cannot be read after several
                tries.
            RunError: the cache, which holds what was packed from Parquet, is gone.
        """
        path, offset, size = self._index.place(i)
        _check_size(size)
        for wait in (*_RETRY_SECONDS, None):
            try:
                return self._read(path, offset, size)
            except _HOPELESS as error:
                if self._index.is_packed:
                    raise RunError(f"{path}: {error.strerror}; every node must reach runtime.cache") from None
                raise Undecodable(f"cannot be read: {error.strerror or error}") from None
            except OSError as error:
                if wait is None:
                    raise Undecodable(f"cannot be read: {error.strerror or error}") from None
                (self._remote_file if self._is_remote else self._local_file).cache_clear()
                time.sleep(wait)
        raise AssertionError("unreachable")

    def read_many(self, indices: Iterable[int]) -> list[bytes | Undecodable]:
        """`read` for each index, in order; what it would raise stands in the place of the bytes."""
        if not self._is_remote:
            return [self._try(i) for i in indices]
        with ThreadPoolExecutor(_NUM_REMOTE_READERS) as threads:
            return list(threads.map(self._try, indices))

    def _try(self, i: int) -> bytes | Undecodable:
        try:
            return self.read(int(i))
        except Undecodable as failure:
            return failure

    def _read(self, path: str, offset: int, size: int) -> bytes:
        if size < 0:
            return self._whole_remote_file(path) if self._is_remote else _whole_file(path)
        file = self._remote_file(path) if self._is_remote else self._local_file(path)
        data = file.read_at(size, offset)
        if len(data) < size:
            raise Undecodable(
                f"{os.path.basename(path)} ends inside this sample: it was cut after it was indexed"
            )
        return data

    @property
    def _is_remote(self) -> bool:
        return bool(self._index.uri) and not self._index.is_packed

    @functools.cached_property
    def _filesystem(self) -> pyarrow.fs.FileSystem:
        return listing.open_filesystem(self._index.uri)[0]

    @functools.cached_property
    def _remote_file(self) -> Any:
        return functools.lru_cache(_NUM_HANDLES)(self._filesystem.open_input_file)

    def _whole_remote_file(self, path: str) -> bytes:
        with self._filesystem.open_input_file(path) as file:
            _check_size(file.size())
            return file.read()


class _LocalFile:
    """An open file for many reads; it closes when the last reader lets go of it."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read_at(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)


def _whole_file(path: str) -> bytes:
    # Without O_NONBLOCK, opening a pipe that has taken the file's place would wait for ever.
    with open(
        path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
    ) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Undecodable("not a regular file")
        _check_size(status.st_size)
        return file.read()


@functools.lru_cache(maxsize=16)
def content_hash(index: Index) -> str:
    """Sixteen hexadecimal digits of an index and of the bytes of 64 samples spread over it: names, labels and sizes alone
    are the same for other images of one fixed size."""
    count = min(_NUM_HASHED, len(index))
    samples = np.arange(count) * len(index) // max(count, 1)
    digest = hashlib.blake2b(index.hash.encode(), digest_size=8)
    for data in Reader(index).read_many(samples):
        digest.update(b"" if isinstance(data, Undecodable) else hashlib.blake2b(data).digest())
    return digest.hexdigest()


def _check_size(size: int) -> None:
    if size > MAX_SAMPLE_BYTES:
        raise Undecodable(f"{size} bytes, more than the {MAX_SAMPLE_BYTES} that are ever loaded")
