"""What a person sees while a run goes: one line with steps, loss, rate and time left."""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from iwm_ray.training import metrics_log

_SECONDS_BETWEEN_LINES = 10.0  # where the output is a file, not a terminal


class Progress:
    """Reads a run's metrics file now and then and shows where the run stands."""

    def __init__(
        self, metrics: Path, total_steps: int, global_batch_size: int, out: TextIO = sys.stdout
    ) -> None:
        self._metrics, self._total, self._size, self._out = metrics, total_steps, global_batch_size, out
        self._shown_at, self._shown_step = 0.0, -1
        self._monitors: Mapping[str, Any] = {}

    def show(self) -> None:
        """Prints the newest report, if there is a new one and it is time."""
        rows = metrics_log.read(self._metrics)
        trained = [row for row in rows if "train/loss" in row]
        self._monitors = next((row for row in reversed(rows) if "monitor/rankme" in row), {})
        wait = 0.5 if self._out.isatty() else _SECONDS_BETWEEN_LINES
        if not trained or trained[-1]["step"] == self._shown_step or time.monotonic() - self._shown_at < wait:
            return
        self._shown_at, self._shown_step = time.monotonic(), trained[-1]["step"]
        line = progress_line(trained[-1], self._monitors, self._total, self._size)
        end = "\r" if self._out.isatty() else "\n"
        print(line.ljust(110) if end == "\r" else line, end=end, file=self._out, flush=True)

    def close(self) -> None:
        """Leaves the last line standing."""
        if self._out.isatty() and self._shown_step >= 0:
            print(file=self._out)


def progress_line(
    row: Mapping[str, Any], monitors: Mapping[str, Any], total_steps: int, batch_size: int
) -> str:
    """`step 120/600 · loss 0.412 · 310 images/s · 2 min 40 s left · RankMe 31 · kNN 0.48`."""
    rate = row["train/samples_per_second"]
    parts = [
        f"step {row['step']}/{total_steps}",
        f"loss {row['train/loss']:.4f}" if row["train/loss"] is not None else "loss not finite",
        f"{rate:,.0f} images/s",
        f"{duration((total_steps - row['step']) * batch_size / rate)} left",
    ]
    if "monitor/rankme" in monitors:
        parts.append(f"RankMe {monitors['monitor/rankme']:.0f}")
    if "monitor/knn_top1" in monitors:
        parts.append(f"kNN {monitors['monitor/knn_top1']:.3f}")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """`2 h 5 min`, `3 min 20 s` or `14 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def scanning(name: str) -> Callable[[int], None]:
    """A callback that says, for large data sets, how many samples a scan has found."""

    def say(count: int) -> None:
        print(f"scanning {name}: {count:,} samples", flush=True)

    return say
