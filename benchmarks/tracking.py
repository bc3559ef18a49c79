"""What tracking costs a run: `python benchmarks/tracking.py [--json]`.

- tracking-dead-server: wall time of a process that computes and appends metrics while the driver's tracker
  faces a server that is not there (ours), beside the same process without a tracker (peer).
- tracking-finish-dead: seconds that `finish` takes when the server is not there; the limit is its deadline.
- tracking-replay: seconds until 10,000 metrics that waited are in MLflow's SQLite store; the limit is 30.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from iwm_ray.config import Config, TrackingConfig
from iwm_ray.runtime.tracking import Tracker, open_tracker

WRITER = """
import json, sys, time
import numpy as np
a = np.ones((256, 256), np.float32)
start = time.perf_counter()
with open(sys.argv[1], "a", buffering=1) as file:
    for step in range(1000):
        for _ in range(10):
            a @ a
        report = {"step": step, "time": time.time(), "train/loss": 0.5, "train/lr": 1e-3}
        file.write(json.dumps(report) + chr(10))
print(time.perf_counter() - start)
"""
DEAD = "http://127.0.0.1:9"  # the discard port: refused at once
DEADLINE_SECONDS = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON line for each figure")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: 7)")
    options = parser.parse_args()
    with_tracker, without, finishing = [], [], []
    for _ in range(options.rounds):
        wall, finish = dead_server(DEAD)
        with_tracker.append(wall)
        finishing.append(finish)
        without.append(dead_server("none")[0])
    replays = [replay() for _ in range(min(options.rounds, 3))]
    show = print_json if options.json else print_line
    show("tracking-dead-server", "s", with_tracker, peer=statistics.median(without))
    show("tracking-finish-dead", "s", finishing, limit=DEADLINE_SECONDS)
    show("tracking-replay", "s for 10000 metrics", replays, limit=30.0)


def dead_server(uri: str) -> tuple[float, float]:
    """Seconds that the writer takes, and seconds that `finish` takes."""
    with tempfile.TemporaryDirectory() as folder:
        with open_tracker(Path(folder), _config(uri), "benchmark", say=_quiet) as tracker:
            wall = float(_python(WRITER, folder + "/metrics.jsonl"))
            start = time.perf_counter()
            tracker.finish(deadline_seconds=DEADLINE_SECONDS)
        return wall, time.perf_counter() - start


def replay() -> float:
    """Seconds from the start of a command to 10,000 metrics in a fresh SQLite store."""
    with tempfile.TemporaryDirectory() as folder:
        with open(folder + "/metrics.jsonl", "w") as file:
            for step in range(1000):
                values = {f"train/{number}": float(step) for number in range(10)}
                file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        start = time.perf_counter()
        config = _config(f"sqlite:///{folder}/mlflow.db")
        tracker = Tracker(Path(folder), config, "benchmark", say=_quiet).start()
        assert tracker.finish(deadline_seconds=120)
        return time.perf_counter() - start


def print_json(name: str, unit: str, rounds: list[float], **others: float) -> None:
    """One figure as a JSON line."""
    ours = statistics.median(rounds)
    figures = {"name": name, "unit": unit, "ours": ours, **others}
    figures |= {f"ratio_{other}": ours / value for other, value in others.items()}
    figures |= {"rounds": len(rounds), "min": min(rounds), "max": max(rounds), "load": os.getloadavg()[0]}
    print(
        json.dumps(figures | {"versions": {"python": platform.python_version(), "mlflow": version("mlflow")}})
    )


def print_line(name: str, unit: str, rounds: list[float], **others: float) -> None:
    """One figure for people."""
    ours = statistics.median(rounds)
    beside = ", ".join(f"{other} {value:.3f} (ratio {ours / value:.3f})" for other, value in others.items())
    print(f"{name}: {ours:.3f} {unit}; {beside}; {min(rounds):.3f} to {max(rounds):.3f}")


def _config(uri: str) -> Config:
    return Config(recipe="photos_tiny", tracking=TrackingConfig(uri=uri))


def _python(program: str, argument: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, argument], capture_output=True, text=True, check=True
    )
    return done.stdout


def _quiet(line: str) -> None:
    """Swallows what the tracker says."""


if __name__ == "__main__":
    main()
