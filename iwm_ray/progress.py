"""What a person sees while a run goes: one line with steps, loss, rate and time left."""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from iwm_ray.run_directory import RunDirectory, parse_lines

_SECONDS_BETWEEN_LINES = 10.0  # where the output is a file, not a terminal
_SAMPLES_BETWEEN_LINES = 100_000
_SMALL_SCAN = 20_000  # samples; found within a second or two


class Progress:
    """Follows a run's metrics and warnings and shows where the run stands.

    Args:
        run: its directory.
        total_steps: of the run.
        global_batch_size: images of a step.
        out: where lines go; None: stdout.
        title: stands before every report.
        later: images that other runs will see after this one: they count in the time that is left.
    """

    def __init__(
        self,
        run: RunDirectory,
        total_steps: int,
        global_batch_size: int,
        out: TextIO | None = None,
        title: str = "",
        later: int = 0,
    ) -> None:
        self._metrics, self._warnings = _Tail(run.metrics), _Tail(run.warnings)
        self._warnings.read()  # an earlier start has shown them
        self._total, self._size, self._out = total_steps, global_batch_size, out or sys.stdout
        self._title, self._later = title, later
        self._shown_at, self._shown_step = 0.0, -1
        self._trained: Mapping[str, Any] = {}
        self._monitors: Mapping[str, Any] = {}

    def show(self) -> None:
        """Prints new warnings, and the newest report if there is a new one and it is time."""
        for line in self._warnings.read().decode().splitlines():
            self._print(f"warning: {line}", "\n")
        if time.monotonic() - self._shown_at >= (0.5 if self._out.isatty() else _SECONDS_BETWEEN_LINES):
            self._show_newest()

    def close(self) -> None:
        """Shows the last report and leaves it standing."""
        self._show_newest()
        if self._out.isatty() and self._shown_step >= 0:
            print(file=self._out)

    def _show_newest(self) -> None:
        for row in parse_lines(self._metrics.read()):
            if "train/loss" in row:
                self._trained = row
            if "monitor/rankme" in row:
                self._monitors = row
        if not self._trained or self._trained["step"] == self._shown_step:
            return
        self._shown_at, self._shown_step = time.monotonic(), self._trained["step"]
        line = progress_line(self._trained, self._monitors, self._total, self._size, self._later)
        self._print(self._title + line, "\r" if self._out.isatty() else "\n")

    def _print(self, line: str, end: str) -> None:
        print(line.ljust(110) if self._out.isatty() else line, end=end, file=self._out, flush=True)


class _Tail:
    """A file of lines that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> bytes:
        """The whole lines that are new since the last call."""
        if not self._path.exists():
            return b""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        return data[:end]


def progress_line(
    row: Mapping[str, Any], monitors: Mapping[str, Any], total_steps: int, batch_size: int, later: int = 0
) -> str:
    """`step 120/600 · loss 0.412 · 310 images/s · 2 min 40 s left · RankMe 31 · kNN 0.48`."""
    rate = row["train/samples_per_second"]
    parts = [
        f"step {row['step']}/{total_steps}",
        f"loss {row['train/loss']:.4f}" if row["train/loss"] is not None else "loss not finite",
        f"{rate:,.0f} images/s",
        f"{duration(((total_steps - row['step']) * batch_size + later) / rate)} left",
    ]
    if "monitor/rankme" in monitors:
        parts.append(f"RankMe {monitors['monitor/rankme']:.0f}")
    if "monitor/knn_top1" in monitors:
        parts.append(f"kNN {monitors['monitor/knn_top1']:.3f}")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """`3 days 4 h`, `2 h 5 min`, `3 min 20 s` or `14 s`."""
    whole = round(seconds)
    if whole >= 48 * 3600:
        return f"{whole // 86400} days {whole % 86400 // 3600} h"
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def scanning(name: str) -> Callable[[int], None]:
    """A callback that says, for large data sets, how many samples a scan has found."""
    said = 0

    def say(count: int) -> None:
        nonlocal said
        if count >= _SMALL_SCAN and (not said or count >= said + _SAMPLES_BETWEEN_LINES):
            said = count
            print(f"scanning {name}: {count:,} samples", flush=True)

    return say
