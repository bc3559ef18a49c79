"""The place that a command is told to write to, looked at before its work begins."""

import os
import re
import tempfile
from pathlib import Path

from iwm_ray.errors import UsageError


def refuse_url(path: Path) -> None:
    """Raises UsageError for `s3://bucket/run`, which would become a folder `s3:` here."""
    if url := re.search(r"/([a-z][a-z0-9]+):/(.*)", f"/{path}"):
        raise UsageError(
            f"--output {url[1]}://{url[2]}: is no folder; give one that all machines see, such as a mounted bucket"
        )


def new_output(path: Path, is_file: bool = False) -> Path:
    """The absolute path of a file or folder that does not exist yet, in a folder that is made and can be written to.

    Args:
        path: as the user gave it.
        is_file: a file is to be written; else an empty folder that is there will do.

    Raises:
        UsageError: it is there, or cannot be made.
    """
    refuse_url(path)
    path = path.expanduser().absolute()
    try:
        is_taken = path.exists() and (is_file or not path.is_dir() or any(path.iterdir()))
        if not is_taken:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
    except OSError as error:
        raise UsageError(
            f"--output {path}: not writable ({error.strerror}); choose another --output"
        ) from None
    if is_taken:
        raise UsageError(f"--output {path}: is there already; choose another --output")
    return path


def partial_of(path: Path) -> Path:
    """Beside it, where this process alone writes what will get its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def move(partial: Path, path: Path) -> None:
    """Gives what is written its name.

    Raises:
        UsageError: another command was there first.
    """
    try:
        os.rename(partial, path)
    except OSError as error:
        raise UsageError(
            f"--output {path}: cannot be written any more ({error.strerror}); choose another --output"
        ) from None
