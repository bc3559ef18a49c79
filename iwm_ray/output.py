"""The place that a command is told to write to, looked at before its work begins."""

import tempfile
from pathlib import Path

from iwm_ray.errors import UsageError


def new_output(path: Path) -> Path:
    """The absolute path of a file or folder that does not exist yet, in a folder that is made and can be written to.

    Raises:
        UsageError: it is there (but for an empty folder), or cannot be made.
    """
    path = path.expanduser().absolute()
    try:
        is_taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
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
