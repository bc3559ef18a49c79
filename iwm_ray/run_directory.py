"""What a run leaves on disk, and where: the one home of the file names in a run directory."""

import fcntl
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from iwm_ray.config import Config
from iwm_ray.errors import UsageError

_LIBRARIES = (
    "iwm_ray",
    "torch",
    "torchvision",
    "timm",
    "ray",
    "mlflow",
    "pyarrow",
    "numpy",
    "pillow",
    "simplejpeg",
)


@dataclass(frozen=True)
class RunDirectory:
    """A run's folder; every method is about one of its files."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def actions(self) -> Path:
        return self.path / "actions"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def stop_request(self) -> Path:
        """Exists while a running run is asked to save and stop."""
        return self.path / "stop-request"

    @property
    def failure(self) -> Path:
        """Exists from a failure that no restart can mend to the next start by the user."""
        return self.path / "failure.txt"

    @property
    def attempts(self) -> Path:
        """One JSON line for each start by the user."""
        return self.path / "attempts.jsonl"

    def check(self, config: Config) -> None:
        """Refuses, before anything is created, a place where this run can't live.

        Raises:
            UsageError: not writable, not a run directory, or another configuration's run.
        """
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(
                f"--output {self.path}: {parent} is not a writable folder; choose another --output"
            )
        if not self.config.exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise UsageError(
                    f"--output {self.path}: not empty and not a run directory; choose another --output"
                )
            return
        recorded = read_config(self.path)
        if recorded.hash() != config.hash():
            names = [name for name, value in config.flat().items() if recorded.flat().get(name) != value]
            names = [name for name in names if not name.startswith(("runtime.", "tracking."))]
            change = f"{names[0]} {recorded.flat()[names[0]]!r} != {config.flat()[names[0]]!r}"
            more = f" (+{len(names) - 1} more)" if len(names) > 1 else ""
            raise UsageError(
                f"--output {self.path}: holds a run with another configuration: {change}{more}; choose another --output"
            )

    def create(self, config: Config) -> None:
        """Makes the folder and writes `config.json` and `environment.json`; an existing run keeps its own."""
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.actions, self.checkpoints, self.pictures):
            folder.mkdir(exist_ok=True)
        if not self.config.exists():
            write_json(self.environment, environment())
            write_json(self.config, config.model_dump(mode="json"))
        self.stop_request.unlink(missing_ok=True)
        self.failure.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the directory for this process; the system frees it when the process dies.

        Raises:
            UsageError: another process is running in this directory.
        """
        with (self.path / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise UsageError(
                    f"--output {self.path}: a run is live there ({file.read().strip()}); wait for it or stop it first"
                ) from None
            file.truncate(0)
            file.write(
                f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
            )
            file.flush()
            yield

    def num_quarantined(self) -> int:
        """Number of different samples that could not be read so far."""
        return len({record["row_id"] for record in self.quarantined()})

    def quarantined(self) -> list[dict[str, str]]:
        """The bad samples: row_id, path, reason."""
        return read_lines(self.quarantine)


def read_config(run: Path) -> Config:
    """The configuration that a run directory records.

    Raises:
        UsageError: `run` is no run directory.
    """
    try:
        return Config.model_validate_json((run / "config.json").read_text())
    except OSError:
        raise UsageError(
            f"RUN {run}: no config.json there; give the folder that a training run wrote"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"RUN {run}: config.json is not this version's ({str(error).splitlines()[0]})"
        ) from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; none where it is missing. A line that is still being written is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_json(path: Path, value: Any) -> None:
    """Writes a whole JSON file or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def environment() -> dict[str, Any]:
    """Versions, git commit and hardware of this process."""
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "git_commit": _git_commit(),
        "versions": versions,
    }


def _git_commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git on this machine
        return None
    return found.stdout.strip() or None
