"""What makes a folder a checkpoint: a manifest that says of every file its size and SHA-256, and of itself a
checksum.

Everything here distrusts what it reads: links are not followed, only three file names are known, and a
manifest counts only if writing it again gives the same bytes.
"""

import errno
import hashlib
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from iwm_ray.errors import UsageError

FORMAT_VERSION = 1
MANIFEST, MODEL, OPTIMIZER, STATE = (
    "MANIFEST.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
)
FILES = (MODEL, OPTIMIZER, STATE)
_MAX_MANIFEST_BYTES = 100_000


class DamagedError(Exception):
    """A folder is no intact checkpoint; the message says why."""


class Record(BaseModel):
    """JSON of a checkpoint: exactly these fields, exactly these types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileRecord(Record):
    """A file of a checkpoint."""

    name: Literal["model.safetensors", "optimizer.safetensors", "state.json"]
    bytes: int
    sha256: str


class Manifest(Record):
    """A checkpoint's description, written last."""

    format_version: int
    sequence: int
    """rises by one with every checkpoint of a run; the largest is the newest"""
    step: int
    generation: int
    """the attempt that wrote it"""
    config_hash: str
    metric: float | None
    """the higher, the better"""
    versions: dict[str, str]
    files: list[FileRecord]


def folder_name(step: int) -> str:
    """A checkpoint's name in the folder of checkpoints."""
    return f"step_{step:08d}"


def record(path: Path) -> FileRecord:
    """Reads a file to its end and says what it holds."""
    with _open(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(name=path.name, bytes=file.tell(), sha256=digest)  # type: ignore[arg-type]


def sealed(manifest: dict[str, Any]) -> bytes:
    """The one way to write this manifest, with its checksum."""
    checksum = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest | {"checksum": checksum}, sort_keys=True, indent=1).encode()


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint folder `path`.

    Raises:
        DamagedError: there is none, or not as it was written.
        UsageError: it was written by a newer version of iwm_ray.
    """
    if path.is_symlink():
        raise DamagedError("is a symbolic link")
    try:
        with _open(path / MANIFEST) as file:
            data = file.read(_MAX_MANIFEST_BYTES)
        tree = json.loads(data)
        if not isinstance(tree, dict) or not tree.pop("checksum", "") or sealed(tree) != data:
            raise DamagedError(f"{MANIFEST} does not match its checksum")
        if tree.get("format_version", 0) > FORMAT_VERSION:
            versions = tree.get("versions")
            raise UsageError(
                f"checkpoint {path} was written by a newer iwm_ray ({versions}); upgrade iwm_ray"
            )
        return Manifest.model_validate(tree)
    except OSError as error:
        raise DamagedError(f"{MANIFEST}: {error.strerror}") from None
    except (ValueError, TypeError, RecursionError) as error:  # not JSON, or not this JSON
        raise DamagedError(f"{MANIFEST} is not readable ({type(error).__name__})") from None


def verify(path: Path, manifest: Manifest) -> None:
    """Reads every file to its end.

    Raises:
        DamagedError: a file is missing, or not as it was written.
    """
    if tuple(file.name for file in manifest.files) != FILES:
        raise DamagedError(f"{MANIFEST} does not list {', '.join(FILES)}")
    for expected in manifest.files:
        try:
            found = record(path / expected.name)
        except OSError as error:
            raise DamagedError(f"{expected.name}: {error.strerror}") from None
        if found.bytes != expected.bytes:
            raise DamagedError(f"{expected.name} has {found.bytes} bytes instead of {expected.bytes}")
        if found.sha256 != expected.sha256:
            raise DamagedError(f"{expected.name} has changed since it was written")


def is_intact(path: Path, manifest: Manifest) -> bool:
    """Whether `verify` finds nothing."""
    try:
        verify(path, manifest)
    except DamagedError:
        return False
    return True


def has_all_bytes(path: Path, manifest: Manifest) -> bool:
    """Whether all files are there in their sizes; reads none of them."""
    try:
        sizes = [(path / file.name).lstat().st_size == file.bytes for file in manifest.files]
    except OSError:
        return False
    return all(sizes) and tuple(file.name for file in manifest.files) == FILES


def list_manifests(directory: Path) -> tuple[list[tuple[Path, Manifest]], list[str]]:
    """Checkpoints with a readable manifest, the newest first, and what is wrong with the others."""
    readable: list[tuple[Path, Manifest]] = []
    unreadable: list[str] = []
    for path in sorted(directory.glob("step_*")):
        try:
            manifest = read_manifest(path)
            if path.name != folder_name(manifest.step):
                raise DamagedError(f"holds step {manifest.step}")
            readable.append((path, manifest))
        except DamagedError as reason:
            unreadable.append(f"{path.name}: {reason}")
    return sorted(readable, key=lambda pair: pair[1].sequence, reverse=True), unreadable


def _open(path: Path) -> BufferedReader:
    """Opens a regular file for reading; links are not followed, and a pipe does not hang."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb")
