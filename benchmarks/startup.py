"""How long a run waits for its first batch: `python benchmarks/startup.py [--files 1000 10000 100000] [--json]`.

Folders of N photographs (hard links to a few hundred JPEGs). For each N, in processes of their own with a Ray of their
own, in interleaved rounds:

- `ours`: from asking the stream for rows to the first batch of 128 with two views (runtime/pipeline.py): Ray names the
  tasks and starts worker processes.
- `first_task`: to the same batch, from the moment at which the first data task begins, imports included. The limit is
  5 s, whatever the number of files.
- `peer`: from `ray.data.read_images` with a resize to the first batch of 128.

Beside them: `scan` (the one look at all files, when the data is first seen), `open` (the index of a folder that has
not changed) and `init` (ray.init).
"""

import argparse
import contextlib
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

from iwm_ray.build import build
from iwm_ray.config import Config, DataConfig, OptimizerConfig, RuntimeConfig
from iwm_ray.run_directory import RunDirectory

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos"
LIMIT_SECONDS = 5.0
BATCH = 128
CLASSES = 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=PHOTOS, help="folder with JPEG files")
    parser.add_argument("--files", type=int, nargs="+", default=[1000, 10_000, 100_000], metavar="N")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default: 3)")
    parser.add_argument("--json", action="store_true", help="one JSON line for each figure")
    parser.add_argument("--child", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(
            json.dumps(ours(options.data, options.cache) if options.child == "ours" else peer(options.data))
        )
        return
    show = print_json if options.json else print_lines
    with tempfile.TemporaryDirectory(prefix="iwm-") as folder:
        for count in options.files:
            show(count, measure(options.data, Path(folder) / str(count), count, options.rounds))


def measure(photos: Path, folder: Path, count: int, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each part in each round."""
    link(photos, folder / "data", count)
    seconds: dict[str, list[float]] = {}
    for number in range(num_rounds):
        for child in ("ours", "peer") if number % 2 else ("peer", "ours"):
            cache = folder / f"cache-{number}"
            command = [
                sys.executable,
                __file__,
                "--child",
                child,
                "--data",
                folder / "data",
                "--cache",
                cache,
            ]
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
            # Ray's workers would wait for all other work on the machine.
            environment["RAY_worker_niceness"] = "0"
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                seconds.setdefault(name, []).append(value)
    return seconds


def ours(data: Path, cache: Path) -> dict[str, float]:
    """Seconds of scan, opening again, ray.init and first batch."""
    from iwm_ray.runtime import cluster, pipeline

    config = Config(
        recipe="benchmark",
        data=DataConfig(path=str(data)),
        optimizer=OptimizerConfig(global_batch_size=BATCH),
        runtime=RuntimeConfig(cache=str(cache)),
    )
    run = RunDirectory(cache / "run")
    scan, setup = timed(lambda: build(config, run))
    open_again, _ = timed(lambda: build(config, run))
    os.environ.pop("RAY_ADDRESS", None)
    init, _ = timed(lambda: cluster.connect(config))
    layout = pipeline.Layout.of(setup.feed, setup.batch_size, 1, 0, 10**6)
    begun = cache / "begun"

    def blocks(*arguments):
        """In the task, which imports nothing of ours before this."""
        with contextlib.suppress(FileExistsError), begun.open("x") as file:
            file.write(str(time.time()))
        from iwm_ray.runtime import pipeline

        yield from pipeline._blocks(*arguments)

    pipeline._blocks = blocks

    def first() -> None:
        stream = pipeline.stream(setup.feed, layout)
        stream.context.execution_options = pipeline.execution_options(config.runtime)
        next(iter(stream.iter_batches(batch_size=BATCH)))

    since_asking, _ = timed(first)
    since_first_task = time.time() - float(begun.read_text())
    return {
        "scan": scan,
        "open": open_again,
        "init": init,
        "ours": since_asking,
        "first_task": since_first_task,
    }


def peer(data: Path) -> dict[str, float]:
    """Seconds until the first batch of Ray's own reader."""
    import ray

    ray.init(address="local", include_dashboard=False, logging_level="ERROR")

    def first() -> None:
        images = ray.data.read_images(str(data), size=(224, 224), mode="RGB")
        next(iter(images.iter_batches(batch_size=BATCH)))

    return {"peer": timed(first)[0]}


def timed(action):
    """(seconds, result) of calling `action`."""
    begin = time.perf_counter()
    result = action()
    return time.perf_counter() - begin, result


def link(photos: Path, folder: Path, count: int) -> None:
    """A class-folder tree of `count` files."""
    sources = []
    originals = folder.parent / "originals"
    originals.mkdir(parents=True)
    for number, photo in enumerate(sorted(photos.rglob("*.[jJ][pP]*[gG]"))[:500]):
        copy = originals / f"{number}.jpg"
        copy.write_bytes(photo.read_bytes())
        sources.append(copy)
    for label in range(CLASSES):
        (folder / f"class-{label:03d}").mkdir(parents=True)
    for number in range(count):
        os.link(
            sources[number % len(sources)], folder / f"class-{number % CLASSES:03d}" / f"{number:07d}.jpg"
        )


def print_json(count: int, seconds: dict[str, list[float]]) -> None:
    """One figure as a JSON line."""
    middle = {name: statistics.median(rounds) for name, rounds in seconds.items()}
    figure = {"name": f"startup-{count}", "unit": "s", **middle, "limit": LIMIT_SECONDS}
    figure |= {
        "ratio_peer": middle["peer"] / middle["ours"],
        "ratio_limit": LIMIT_SECONDS / middle["first_task"],
    }
    figure |= {"rounds": len(seconds["ours"]), "min": min(seconds["ours"]), "max": max(seconds["ours"])}
    versions = {"python": platform.python_version(), "ray": version("ray")}
    print(json.dumps(figure | {"load": os.getloadavg()[0], "versions": versions}), flush=True)


def print_lines(count: int, seconds: dict[str, list[float]]) -> None:
    """One figure for people."""
    parts = [
        f"{name} {statistics.median(rounds):.2f} s [{min(rounds):.2f}, {max(rounds):.2f}]"
        for name, rounds in seconds.items()
    ]
    print(f"{count:>9,} files: {';  '.join(parts)};  load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
