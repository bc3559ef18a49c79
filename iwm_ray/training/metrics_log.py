"""RUN/metrics.jsonl: every metric of a run, once; the record from which other trackers are filled.

One JSON object a line: {"step": 500, "time": 1750000000.0, "train/loss": 0.41}. Lines are only ever added, so
a reader may follow the file by its byte offset, up to the last newline. `time` is seconds since 1970 and
never falls; a value that was not finite is null.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat


class MetricsLog:
    """Writes metrics so that none is lost and none doubled, whatever is run again after a kill.

    Each name has its own last step: a value at or below it has been written before, and since steps are
    deterministic it was the same value, so it is left out. A line that a crash tore is cut off when the file
    is opened; the step it belonged to is not the last one then, and is written when it is run again. For
    this, `sync` must come before the checkpoint of a step does.

    Args:
        path: the file; it is created where it is missing. One process writes it at a time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last_step: dict[str, int] = {}
        self._last_time = 0.0
        self._pending = b""
        _cut_torn_line(path)
        for line in read(path):
            self._last_time = max(self._last_time, line["time"])
            self._last_step.update(dict.fromkeys(_names(line), line["step"]))
        self._size = path.stat().st_size

    def append(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Adds one line with those metrics that have not been written for this step or a later one.

        Where the disk refuses it, the line is kept in memory and tried again with the next one.

        Args:
            step: optimizer steps done.
            metrics: name, such as `train/loss`, -> number (a scalar tensor is read).
        """
        new = {name: float(value) for name, value in metrics.items() if step > self._last_step.get(name, -1)}
        if new:
            self._write(step, new)

    def correct(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Adds figures that were measured again, on more images than those of the same names before; they count from
        now on, and what was written stays."""
        known: dict[str, Any] = {}
        for line in read(self._path):
            if line["step"] == step:
                known |= line
        new = {name: float(value) for name, value in metrics.items() if _kept(value) != known.get(name, "")}
        if new:
            self._write(step, new)

    def _write(self, step: int, new: Mapping[str, float]) -> None:
        self._last_time = max(
            self._last_time, time.time()
        )  # a clock set back must not make time run backwards
        values = {name: _kept(value) for name, value in new.items()}
        line = {"step": int(step), "time": self._last_time} | values
        self._pending += json.dumps(line, allow_nan=False).encode() + b"\n"
        self._last_step.update(dict.fromkeys(new, step))
        self._write_pending()

    def sync(self) -> None:
        """Waits until what has been appended is on the disk, as far as the disk accepts it."""
        self._write_pending()
        with self._path.open("rb") as file:
            os.fsync(file.fileno())

    def _write_pending(self) -> None:
        try:
            with self._path.open("ab", buffering=0) as file:
                file.truncate(self._size)  # what an earlier refusal left of a line
                written = file.write(self._pending)
        except OSError:
            return
        if written == len(self._pending):
            self._size += written
            self._pending = b""


def _kept(value: SupportsFloat) -> float | None:
    """As it stands in the file."""
    return float(value) if math.isfinite(float(value)) else None


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of the file as dictionaries; a line that is still being written, or is damaged, is left out."""
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            lines.append(record)
    return lines


def _names(line: Mapping[str, Any]) -> list[str]:
    return [name for name in line if name not in ("step", "time")]


def _cut_torn_line(path: Path) -> None:
    path.touch()
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
