"""What a trial of a sweep costs beyond its own work: `python benchmarks/sweep.py [--json]`.

Runs tiny trials one after the other under Ray Tune with one process that is used again, and compares the time between
the first trial's end and the last one's with the time that the trials themselves say they worked. Goal: under 5 s a trial.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from iwm_ray.config import Config, MonitorConfig, TrackingConfig
from iwm_ray.run_directory import RunDirectory
from iwm_ray.runtime import tune
from iwm_ray.sweeping.job import Job
from iwm_ray.sweeping.record import SweepDirectory
from iwm_ray.sweeping.space import QUICK, Axis, Sweep, base
from iwm_ray.trial import run_trial

LIMIT_SECONDS = 5.0


def tiny(cache: str) -> Config:
    """A configuration whose training takes seconds."""
    usual = base("laptop")
    config = Sweep("overhead", "", usual, ()).smoke().base
    runtime = config.runtime.model_copy(update={"cache": cache, "threads_per_worker": 1})
    monitor = MonitorConfig(**config.monitor.model_dump() | {"every_steps": 12})
    tracking = TrackingConfig(uri="none")
    return config.model_copy(update={"runtime": runtime, "monitor": monitor, "tracking": tracking})


def measure(trials: int) -> dict[str, object]:
    """Runs the trials and compares the clocks."""
    with tempfile.TemporaryDirectory() as folder:
        cache = str(Path(folder, "cache"))
        quick = QUICK.model_copy(update={"tasks": ("mrr",), "images": 8, "views": 8})
        seeds = Axis.of("seed", *range(trials + 1))
        sweep = Sweep("overhead", "What does a trial cost?", tiny(cache), (seeds,), quick)
        directory = SweepDirectory(Path(folder, "sweep"))
        jobs = [Job(sweep, trial, directory, {}) for trial in sweep.trials()]
        room = tune.make_room(sweep.base, 1.0, len(jobs), most=1)
        with RunDirectory(directory.path).lock():
            directory.plan(sweep, sweep.trials())
            tune.connect(sweep.base, room)
            ends: list[float] = []
            begin = time.monotonic()
            tune.run_trials(
                jobs, run_trial, room, max_failures=0, say=lambda line: ends.append(time.monotonic())
            )
        worked = [
            sum(
                json.loads((directory.run(job.trial.hash).path / "trial.json").read_text())[
                    "seconds"
                ].values()
            )
            for job in jobs
        ]
    over = [end - before - own for before, end, own in zip(ends, ends[1:], worked[1:], strict=False)]
    return {
        "name": "sweep_overhead",
        "unit": "seconds a trial beyond its own work",
        "ours": round(statistics.median(over), 2),
        "peer": None,
        "limit": LIMIT_SECONDS,
        "ratio_limit": round(statistics.median(over) / LIMIT_SECONDS, 3),
        "rounds": len(over),
        "min": round(min(over), 2),
        "max": round(max(over), 2),
        "first_trial": round(ends[0] - begin - worked[0], 2),
        "trial_seconds": round(statistics.median(worked[1:]), 2),
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in ("ray", "torch")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line alone")
    parser.add_argument("--trials", type=int, default=5, help="trials after the first one")
    options = parser.parse_args()
    found = measure(options.trials)
    print(json.dumps(found))
    if not options.json:
        print(
            f"a trial costs {found['ours']} s beyond its {found['trial_seconds']} s of work; goal {LIMIT_SECONDS:g} s"
        )


if __name__ == "__main__":
    main()
