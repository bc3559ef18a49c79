"""What lies under `data.path`: folders of images, Parquet files or tar shards, local or remote.

Only names, sizes and modification times are read here. Links are followed, each folder once, so that a loop
ends; pipes, devices and dangling links are passed over without being opened.
"""

import glob
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import BinaryIO, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.fs
from numpy.typing import NDArray

from iwm_ray.errors import UsageError

Kind = Literal["images", "parquet", "tar"]
Progress = Callable[[int], None]
"""called now and then with the number of samples found so far"""

LOOKED_FOR = ".jpg .jpeg .png .webp files, .parquet files or .tar shards"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_KINDS: dict[str, Kind] = {**dict.fromkeys(IMAGE_SUFFIXES, "images"), "parquet": "parquet", "tar": "tar"}
_COMPRESSED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2|txz)$", re.IGNORECASE)
_URI = re.compile(r"[a-z][a-z0-9+.-]+://")
# Control characters, line separators, and the surrogates by which Python stands for bytes that are not UTF-8.
_ODD_CHARACTERS = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff]")
_SECRETS = re.compile(r"(?<=//)[^/@:]*:[^/@]*@|\?.*=.*$")
_WILDCARDS = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Location:
    """A place that the user named, on this machine's files or on a remote filesystem."""

    setting: str
    """data.path or data.test_path, for messages"""
    uri: str
    """as the user gave it; names the filesystem again in another process"""
    filesystem: pyarrow.fs.FileSystem | None
    """None: local files"""
    path: str
    """absolute local path, or path inside the filesystem"""

    @classmethod
    def parse(cls, setting: str, uri: str) -> "Location":
        """Raises UsageError for an empty name, an unknown scheme or a URI that cannot be parsed."""
        if not uri:
            raise UsageError(
                f"{setting} is empty: give --{_flag(setting)} a folder, Parquet files or tar shards"
            )
        if not _URI.match(uri):
            return cls(setting, uri, None, os.path.abspath(os.path.expanduser(uri)))
        try:
            filesystem, path = open_filesystem(uri)
        except (ValueError, OSError) as error:
            raise UsageError(
                f"{setting} {_SECRETS.sub('', uri)}: {one_line(error)}; "
                "needs a local path or a URI that pyarrow reads (s3:// gs:// abfs:// file://)"
            ) from None
        local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
        return cls(setting, uri, None if local else filesystem, path)

    def at(self, path: str) -> "Location":
        """Another place on the same filesystem."""
        return Location(self.setting, self.uri, self.filesystem, path)

    def join(self, name: str) -> str:
        """Path of a name relative to this place."""
        return f"{self.path.rstrip('/')}/{name}"

    def open(self, name: str) -> BinaryIO:
        """Opens a file below this place for reading, with `seek`."""
        try:
            if self.filesystem is None:
                return open(self.join(name), "rb")
            return cast(BinaryIO, self.filesystem.open_input_file(self.join(name)))
        except OSError as error:
            raise self.refuse(f"{name} cannot be read ({one_line(error)})") from None

    def infos(self, what: list[str] | pyarrow.fs.FileSelector) -> list[pyarrow.fs.FileInfo]:
        """What the filesystem knows about some paths, or about everything below one."""
        try:
            return (self.filesystem or pyarrow.fs.LocalFileSystem()).get_file_info(what)
        except (OSError, ValueError) as error:
            raise self.refuse(f"cannot be read ({one_line(error)})") from None

    def refuse(self, what: str) -> UsageError:
        """The error for data at this place that cannot be used."""
        return UsageError(f"{self.setting} {self.shown}: {what}")

    @property
    def shown(self) -> str:
        """The URI without keys and passwords."""
        return _SECRETS.sub("", self.uri)


@dataclass(frozen=True)
class Folder:
    """The images directly in one folder, sorted by name."""

    name: str
    """relative to the root, "" for the root itself"""
    row_ids: pa.LargeStringArray
    """paths relative to the root, as text (see `as_text`)"""
    raw_names: pa.BinaryArray
    """the same paths in the file system's own bytes where the text differs, else null"""
    sizes: NDArray[np.int64]
    """bytes"""
    mtimes: NDArray[np.int64]
    """nanoseconds"""


@dataclass(frozen=True)
class Shard:
    """One Parquet or tar file."""

    name: str
    """relative to the root"""
    size: int
    """bytes"""
    mtime: int
    """nanoseconds"""


@dataclass(frozen=True)
class Listing:
    """Everything usable under a location, in a fixed order. Either `folders` or `shards` is filled."""

    root: Location
    kind: Kind
    folders: tuple[Folder, ...] = ()
    shards: tuple[Shard, ...] = ()
    skipped: int = 0
    """files and folders passed over: other extensions, hidden, links to nowhere, unreadable folders"""
    directories: tuple[tuple[str, int], ...] = ()
    """(path, mtime in nanoseconds) of each local folder that was read"""


def _flag(setting: str) -> str:
    return setting.replace("_", "-")


def one_line(error: Exception) -> str:
    """The message of a library's error, short enough for one line."""
    return " ".join(str(error).split())[:200]


def open_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The filesystem that a URI names, and the path inside it."""
    filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
    return filesystem, path


def list_data(location: Location, progress: Progress | None = None) -> Listing:
    """Finds the images or shards under `location`: a folder, one file, or a pattern with * and ?.

    Raises:
        UsageError: nothing there, nothing usable, or more than one kind.
    """
    file_type = location.infos([location.path])[0].type
    if file_type == pyarrow.fs.FileType.Directory:
        found = _Found(location)
        for folder, files in _walk(location, found):
            found.add(folder, files)
            if progress is not None:
                progress(found.num_images)
        return found.listing()
    if file_type == pyarrow.fs.FileType.File:
        return _shards(location, [location.path])
    if _WILDCARDS.search(location.path):
        return _shards(location, _matches(location))
    raise location.refuse(
        f"does not exist; give --{_flag(location.setting)} a folder, a Parquet file or a tar shard"
    )


_File = tuple[str, int, int]
"""name inside its folder, size in bytes, mtime in nanoseconds"""


class _Found:
    """Collects what a walk finds, folder by folder."""

    def __init__(self, root: Location) -> None:
        self.root = root
        self.num_images = 0
        self.skipped = 0
        self.directories: list[tuple[str, int]] = []
        self._folders: list[Folder] = []
        self._shards: dict[Kind, list[Shard]] = {"parquet": [], "tar": []}
        self._compressed = ""

    def add(self, folder: str, files: list[_File]) -> None:
        """Takes the regular files of one folder, which is named relative to the root."""
        images = []
        for file in files:
            kind = _kind(file[0])
            if kind == "images":
                images.append(file)
            elif kind is not None:
                self._shards[kind].append(Shard(_join(folder, file[0]), file[1], file[2]))
            else:
                self.skipped += 1
                if _COMPRESSED_TAR.search(file[0]):
                    self._compressed = _join(folder, file[0])
        if images:
            self._folders.append(_folder(folder, sorted(images)))
            self.num_images += len(images)

    def listing(self) -> Listing:
        """Decides what kind of data this is."""
        counts: dict[Kind, int] = {kind: len(shards) for kind, shards in self._shards.items()}
        counts["images"] = self.num_images
        kinds = [kind for kind, count in counts.items() if count]
        if len(kinds) > 1:
            found = " and ".join(f"{counts[kind]} {kind} file(s)" for kind in kinds)
            example = f"{self.root.shown.rstrip('/')}/*.{kinds[0]}"
            raise self.root.refuse(
                f"holds {found}; name shards by a pattern, for instance {example}, or part them"
            )
        if not kinds:
            if self._compressed:
                raise _compressed(self.root, self._compressed)
            raise nothing_usable(self.root, self.skipped)
        shards = sorted(self._shards.get(kinds[0], ()), key=lambda shard: shard.name)
        folders = sorted(self._folders, key=lambda folder: folder.name)
        return Listing(
            self.root, kinds[0], tuple(folders), tuple(shards), self.skipped, tuple(self.directories)
        )


def nothing_usable(root: Location, skipped: int) -> UsageError:
    """The error for a place without a single sample."""
    return UsageError(
        f"0 usable images under {root.setting} {root.shown} (looked for {LOOKED_FOR}; {skipped} other files); "
        "give another place"
    )


def _compressed(root: Location, name: str) -> UsageError:
    return root.refuse(f"{name} is a compressed tar, which has no random access; unpack it to a plain .tar")


def _kind(name: str) -> Kind | None:
    return _KINDS.get(name.rpartition(".")[2].lower())


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _folder(folder: str, files: list[_File]) -> Folder:
    names = [_join(folder, file[0]) for file in files]
    if _ODD_CHARACTERS.search("".join(names)) is None:
        row_ids, raw_names = pa.array(names, pa.large_string()), pa.nulls(len(names), pa.binary())
    else:
        texts = [as_text(name) for name in names]
        row_ids = pa.array(texts, pa.large_string())
        raws = [None if text == name else os.fsencode(name) for text, name in zip(texts, names, strict=True)]
        raw_names = pa.array(raws, pa.binary())
    sizes, mtimes = (np.array([file[column] for file in files], np.int64) for column in (1, 2))
    return Folder(as_text(folder), row_ids, raw_names, sizes, mtimes)


def as_text(name: str) -> str:
    """A file name as one line of UTF-8: line breaks and bytes that are not UTF-8 are written as escapes."""
    return _ODD_CHARACTERS.sub(lambda found: ascii(found[0])[1:-1], name)


# Walking a folder


def _walk(root: Location, found: _Found) -> Iterator[tuple[str, list[_File]]]:
    """Yields each folder, named relative to the root, with its regular files; hidden ones are passed over."""
    return _walk_local(root, found) if root.filesystem is None else _walk_remote(root, found)


def _walk_local(root: Location, found: _Found) -> Iterator[tuple[str, list[_File]]]:
    pending, links, visited = [""], list[str](), set[tuple[int, int]]()
    while pending or links:
        # Links come last, so that a linked folder which is also part of the tree keeps its own name.
        folder = pending.pop() if pending else links.pop(0)
        path = os.path.join(root.path, folder)
        try:
            status = os.stat(path)
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise root.refuse(f"cannot be read ({error.strerror})") from None
            found.skipped += 1
            continue
        if (status.st_dev, status.st_ino) in visited:
            found.skipped += 1
            continue
        visited.add((status.st_dev, status.st_ino))
        found.directories.append((path, status.st_mtime_ns))
        yield folder, _regular_files(folder, entries, pending, links, found)


def _regular_files(
    folder: str, entries: list[os.DirEntry[str]], pending: list[str], links: list[str], found: _Found
) -> list[_File]:
    """The regular files among `entries`; folders go on the lists of those still to read."""
    files = []
    for entry in entries:
        try:
            status = None if entry.name.startswith(".") else entry.stat()
        except OSError:  # a link to nowhere or to itself
            status = None
        if status is None:
            found.skipped += 1
        elif stat.S_ISREG(status.st_mode):
            files.append((entry.name, status.st_size, status.st_mtime_ns))
        elif stat.S_ISDIR(status.st_mode):
            (links if entry.is_symlink() else pending).append(_join(folder, entry.name))
        else:
            found.skipped += 1  # a pipe or a device: opening it could wait for ever
    return files


def _walk_remote(root: Location, found: _Found) -> Iterator[tuple[str, list[_File]]]:
    prefix = root.join("")
    folders: dict[str, list[_File]] = {}
    for entry in root.infos(pyarrow.fs.FileSelector(root.path, recursive=True)):
        folder, _, name = entry.path.removeprefix(prefix).rpartition("/")
        if entry.type == pyarrow.fs.FileType.Directory:
            continue
        if not entry.is_file or any(part.startswith(".") for part in (*folder.split("/"), name)):
            found.skipped += 1
        else:
            folders.setdefault(folder, []).append((name, entry.size, entry.mtime_ns or 0))
    yield from folders.items()


# Single shards and patterns


def _matches(location: Location) -> list[str]:
    """Paths that fit a pattern; * and ? stay within one part of the path."""
    if location.filesystem is None:
        return sorted(glob.glob(location.path))
    parts = location.path.split("/")
    base = "/".join(takewhile(lambda part: not _WILDCARDS.search(part), parts))
    selector = pyarrow.fs.FileSelector(base, allow_not_found=True, recursive=True)
    paths = [entry.path for entry in location.infos(selector) if entry.is_file]
    return sorted(path for path in paths if _fits(path.split("/"), parts))


def _fits(path: list[str], pattern: list[str]) -> bool:
    return len(path) == len(pattern) and all(map(fnmatchcase, path, pattern))


def _shards(location: Location, paths: list[str]) -> Listing:
    """The listing of named shards; their row ids are relative to the deepest folder that holds them all."""
    if not paths:
        raise location.refuse("no file fits this pattern")
    base = (
        os.path.dirname(paths[0])
        if len(paths) == 1
        else os.path.commonpath([os.path.dirname(path) for path in paths])
    )
    root = location.at(base)
    kinds: set[Kind | None] = set()
    shards = []
    for info in location.infos(paths):
        name = info.path.removeprefix(root.join(""))
        if _COMPRESSED_TAR.search(name):
            raise _compressed(location, name)
        kinds.add(_kind(name) if info.is_file else None)
        shards.append(Shard(name, info.size or 0, info.mtime_ns or 0))
    kind = kinds.pop()
    if kinds or kind is None or kind == "images":
        raise location.refuse("needs a folder of images, .parquet files of one schema or plain .tar shards")
    return Listing(root, kind, (), tuple(shards))
