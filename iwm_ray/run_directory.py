"""What a run leaves on disk, and where: the one home of the file names in a run directory."""

import fcntl
import json
import os
import platform
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from iwm_ray.config import Config
from iwm_ray.errors import UsageError
from iwm_ray.output import refuse_url

_MEND = "bring it back, or remove this folder and train it again"
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
    def warnings(self) -> Path:
        """What the user should know but need not act on; the driver prints each line once."""
        return self.path / "warnings.txt"

    @property
    def attempts(self) -> Path:
        """One JSON line for each start by the user."""
        return self.path / "attempts.jsonl"

    def check(self, config: Config) -> None:
        """Refuses, before anything is created, a place where this run can't live.

        Raises:
            UsageError: not writable, not a run directory, or another configuration's run.
        """
        self.check_place()
        try:
            # A kill while the run was created leaves dot-files, and the same command must go on.
            strange = self.path.is_dir() and any(
                not entry.name.startswith(".") for entry in self.path.iterdir()
            )
            is_run = self.config.exists()
        except OSError as error:
            raise self._refusal(error.strerror) from None
        if is_run:
            self._refuse_other_run(config)
        elif strange:
            raise self._refusal("not empty and not a run directory")

    def check_place(self) -> None:
        """Refuses, before anything is created, a place where no folder can be made or written.

        Raises:
            UsageError: it is a file, or in one, or may not be written.
        """
        refuse_url(self.path)
        try:
            parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
            is_file, writable = not parent.is_dir(), os.access(parent, os.W_OK | os.X_OK)
        except OSError as error:
            raise self._refusal(error.strerror) from None
        if is_file:
            raise self._refusal(f"{parent} is a file, not a writable folder")
        if not writable:
            raise self._refusal(f"{parent} is not a writable folder")
        try:  # root may do everything, and still some file systems take no files (/proc)
            tempfile.TemporaryDirectory(prefix=".iwm_ray-", dir=parent).cleanup()
        except OSError as error:
            raise self._refusal(f"{parent} is not a writable folder ({error.strerror})") from None

    def create(self, config: Config, data_hash: str) -> None:
        """Writes `config.json` and `environment.json`, which an existing run keeps, and clears what stopped the last start.

        Args:
            config: of the run.
            data_hash: names the training images (Index.hash).

        Raises:
            UsageError: the folder holds another run, or one that began with other images.
        """
        self.check(config)
        if not self.config.exists():
            write_json(self.config, config.model_dump(mode="json"))
        if not self.environment.exists():
            write_json(self.environment, environment() | {"data_hash": data_hash})
        if json.loads(self.environment.read_text()).get("data_hash") not in (None, data_hash):
            raise UsageError(
                f"data.path {config.data.path}: the images are not those that the run in {self.path} began with; "
                "bring them back or choose another --output"
            )
        for folder in (self.actions, self.checkpoints, self.pictures):
            folder.mkdir(exist_ok=True)
        self.stop_request.unlink(missing_ok=True)
        self.failure.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder and holds it for this process; the system frees it when the process dies.

        Raises:
            UsageError: it can't be made, or another process is running there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a+")
        except OSError as error:
            raise self._refusal(error.strerror) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UsageError(
                    f"--output {self.path}: a run is live there ({file.read().strip()}); wait for it or stop it first"
                ) from None
            except OSError:
                pass  # a file system without locks; the checkpoints' generation numbers still keep two runs apart
            file.truncate(0)
            file.write(
                f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
            )
            file.flush()
            yield

    def _refuse_other_run(self, config: Config) -> None:
        recorded = read_config(self.path)
        if recorded.hash() == config.hash():
            return
        before, now = recorded.flat(), config.flat()
        names = [
            name
            for name, value in now.items()
            if before.get(name) != value and not name.startswith(("runtime.", "tracking."))
        ]
        more = f" (+{len(names) - 1} more)" if len(names) > 1 else ""
        raise self._refusal(
            f"holds a run with another configuration: {names[0]} {before[names[0]]!r} != {now[names[0]]!r}{more}"
        )

    def _refusal(self, reason: str | None) -> UsageError:
        return UsageError(f"--output {self.path}: {reason}; choose another --output")

    def warn(self, line: str) -> None:
        """Leaves a line for the user, whose terminal a train worker does not reach."""
        with suppress(OSError), self.warnings.open("a") as file:  # what there is to tell may be a full disk
            file.write(f"{line}\n")

    def num_quarantined(self) -> int:
        """Number of different samples that could not be read so far."""
        return len({record["row_id"] for record in self.quarantined()})

    def quarantined(self) -> list[dict[str, Any]]:
        """The bad samples, as data/quarantine.py notes them."""
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
    except UnicodeDecodeError:
        raise UsageError(f"RUN {run}: config.json is damaged; {_MEND}") from None
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise UsageError(f"RUN {run}: config.json is damaged; {_MEND}") from None
        where = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"RUN {run}: config.json is another version's ({where}: {first['msg']}); use the version that "
            "environment.json names, or train it again elsewhere"
        ) from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; none where it is missing."""
    return parse_lines(path.read_bytes()) if path.exists() else []


def parse_lines(data: bytes) -> list[dict[str, Any]]:
    """JSON lines; one that is torn or still being written is left out."""
    records = []
    for line in data.split(b"\n")[:-1]:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def write_json(path: Path, value: Any) -> None:
    """Writes a whole JSON file or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def environment() -> dict[str, Any]:
    """Versions, git commit and hardware of this process."""
    versions: dict[str, str | None] = {}
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
