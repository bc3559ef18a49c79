"""What measuring a representation costs: `python benchmarks/features.py [--json]`.

- features-extraction: images a second from encoded files to features on the disk (ours), beside the encoder alone on
  images that lie in memory (peer).
- features-cached: seconds until features that are in the cache are open; the limit is 0.1.
- probe-linear-grid: seconds in which the whole grid of linear heads learns (ours), beside one head (peer) and the
  heads one after the other (limit, computed).
- probe-attentive-grid: the same for attentive heads.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from iwm_ray.config import DataConfig, RuntimeConfig
from iwm_ray.data.decode import DecodeLimits
from iwm_ray.data.index import Index
from iwm_ray.data.photos import PHOTOS_TINY
from iwm_ray.evaluation.encoders import TimmEncoder
from iwm_ray.evaluation.features import Features, measuring
from iwm_ray.evaluation.probes import ATTENTIVE, LINEAR, Grid, attentive_probe, linear_probe
from iwm_ray.runtime.measure import extract, work_device

NUM_CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON line for each figure")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--data", default=PHOTOS_TINY, help=f"images to read (default: {PHOTOS_TINY})")
    parser.add_argument("--images", type=int, default=512, help="how many (default: 512)")
    parser.add_argument("--encoder", default="vit_tiny_patch16_224", help="of timm, with random weights")
    parser.add_argument("--image-size", type=int, default=64, help="pixels (default: 64)")
    parser.add_argument("--use-gpu", action="store_true", help="encode and learn on the GPU")
    options = parser.parse_args()
    show = print_json if options.json else print_line
    runtime = RuntimeConfig(engine="local", use_gpu=options.use_gpu)
    encoder = TimmEncoder.open(options.encoder, image_size=options.image_size)
    with tempfile.TemporaryDirectory() as folder:
        index = Index.open(DataConfig(), options.data, Path(folder))
        extraction(
            show, encoder, index, min(options.images, len(index)), runtime, options.rounds, Path(folder)
        )
    device = work_device(runtime)
    probe(
        show,
        "linear",
        lambda grid: linear_probe(*clouds((128,)), grid=grid, device=device),
        LINEAR,
        options.rounds,
    )
    tokens = clouds((16, 128))
    probe(
        show,
        "attentive",
        lambda grid: attentive_probe(*tokens, grid=grid, device=device),
        ATTENTIVE,
        options.rounds,
    )


def extraction(
    show: Callable[..., None],
    encoder: TimmEncoder,
    index: Index,
    count: int,
    runtime: RuntimeConfig,
    rounds: int,
    folder: Path,
) -> None:
    """Both figures of the extraction; every round has a cache of its own."""
    device, model = work_device(runtime), encoder.load().to(work_device(runtime))
    side = encoder.image_size
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8).to(device)
    ours, peer, cached = [], [], []
    for number in range(rounds):

        def features(cache: Path = folder / str(number)) -> None:
            extract(encoder, index, np.arange(count), runtime=runtime, limits=DecodeLimits(), cache=cache)

        def encode() -> None:
            with measuring(model):
                for part in images.split(128):
                    model.tokens(part)[0].mean(1).cpu()

        ours.append(count / seconds(features))
        peer.append(count / seconds(encode))
        cached.append(seconds(features))
    show("features-extraction", "images/s", ours, peer=statistics.median(peer))
    show("features-cached", "s", cached, limit=0.1)


def probe(
    show: Callable[..., None], name: str, learn: Callable[[Grid], object], grid: Grid, rounds: int
) -> None:
    """The grid beside one head. A probe learns twice, the grid and then the winner: that is taken off."""
    short = replace(grid, epochs=1, min_steps=60)
    single = replace(short, learning_rates=grid.learning_rates[:1], weight_decays=grid.weight_decays[:1])
    ours, peer = [], []
    for _ in range(rounds):
        alone = seconds(lambda: learn(single)) / 2
        peer.append(alone)
        ours.append(seconds(lambda: learn(short)) - alone)
    one = statistics.median(peer)
    heads = len(grid.settings)
    show(f"probe-{name}-grid", f"s for {heads} heads x 60 steps", ours, peer=one, limit=one * heads)


def clouds(shape: tuple[int, ...], count: int = 2000) -> tuple[Features, Features]:
    """Random features of as many training as test images."""
    values = np.random.default_rng(0).standard_normal((count, *shape), np.float32)
    names = tuple(map(str, range(NUM_CLASSES)))
    rows = np.arange(count)
    found = Features(values, rows % NUM_CLASSES, rows, names, "random")
    return found, replace(found, values=values[:100], labels=found.labels[:100], samples=rows[:100])


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def print_json(name: str, unit: str, rounds: list[float], **others: float) -> None:
    """One figure as a JSON line."""
    ours = statistics.median(rounds)
    figures = {"name": name, "unit": unit, "ours": ours, **others}
    figures |= {f"ratio_{other}": ours / value for other, value in others.items()}
    figures |= {"rounds": len(rounds), "min": min(rounds), "max": max(rounds), "load": os.getloadavg()[0]}
    versions = {"python": platform.python_version(), "torch": version("torch"), "timm": version("timm")}
    print(json.dumps(figures | {"versions": versions}))


def print_line(name: str, unit: str, rounds: list[float], **others: float) -> None:
    """One figure for people."""
    ours = statistics.median(rounds)
    beside = ", ".join(f"{other} {value:.3f} (ratio {ours / value:.3f})" for other, value in others.items())
    print(f"{name}: {ours:.3f} {unit}; {beside}; {min(rounds):.3f} to {max(rounds):.3f}")


if __name__ == "__main__":
    main()
