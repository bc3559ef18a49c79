"""What a training image costs until it is a torch batch: `python benchmarks/loader.py [--data PATH] [--json]`.

Side by side, in interleaved rounds of one run, each engine in a process tree of its own:

- `ray-host`, `ray-device`: Ray Data as a run uses it (runtime/pipeline.py), with its action log; two uint8 views,
  or one uint8 crop with its parameters, in torch batches.
- `local-device`: the same rows by the loader of runs without Ray (loader.py), two processes.
- `peer`: an I-JEPA-style DataLoader, two workers: Pillow and torchvision's transforms with the same
  augmentations, two uint8 views. `peer-float`: the same, normalised to float32 as I-JEPA's own code does.
- `decode`: the limit, nothing but decoding, one process.

The figure is CPU time, user and system, of the whole process tree over the images made in that time: for Ray the
driver, GCS, raylet, agents and all workers are children of the engine's process; the times of children that ended
are in their parents'. Start-up is left out: a round begins once the engine's buffers have been emptied, ends while
it is still producing, and counts the rows that the data tasks finished in between (the files of the action log).
Wall-clock rates stand beside; on a machine with other load only CPU time can be compared.

Also compares pixels: our two views with torchvision's functional operations on Pillow images, same parameters.
"""

import argparse
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

from iwm_ray.build import build
from iwm_ray.config import Config, DataConfig, OptimizerConfig, RuntimeConfig, ViewsConfig
from iwm_ray.feed import Feed
from iwm_ray.run_directory import RunDirectory

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos"
ENGINES = ("peer", "peer-float", "ray-host", "ray-device", "local-device", "decode")
IMAGES = {"peer": 1024, "peer-float": 1024, "decode": 2048}
"""how many images a round takes; 4096 where nothing is said: blocks finish in steps of 128"""
WARM_IMAGES = 2048
BATCH = 128
CLOSE_SECONDS = 20


Progress = Generator[int, None, None]


@dataclass(frozen=True)
class Round:
    """What one engine needed in one round."""

    images: int
    cpu_seconds: float
    wall_seconds: float

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds an image."""
        return self.cpu_seconds / self.images * 1e3

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.wall_seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=PHOTOS, help="folder of class folders with JPEG files")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: 7)")
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES, metavar="ENGINE")
    parser.add_argument("--json", action="store_true", help="one JSON line for each figure")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        serve(options.engine, options.data, options.folder)
        return
    with tempfile.TemporaryDirectory(prefix="iwm-") as folder:
        data = options.data if options.data.is_dir() else synthetic_photos(Path(folder) / "photos")
        report = Report(data, options.json)
        report.pixels(*pixel_differences(data, Path(folder)))
        children = {engine: Child(engine, data, Path(folder)) for engine in options.engines}
        try:
            report.rates(measure(children, options.rounds))
        finally:
            close(children.values())


# ---- rounds ----


def measure(children: "dict[str, Child]", num_rounds: int) -> dict[str, list[Round]]:
    """The rounds of each engine, interleaved."""
    rounds: dict[str, list[Round]] = {engine: [] for engine in children}
    for number in range(num_rounds):
        for engine in children if number % 2 else reversed(children):
            rounds[engine].append(children[engine].round(IMAGES.get(engine, 4096)))
            note(f"round {number + 1}/{num_rounds} {engine}: {rounds[engine][-1].cpu_ms:.2f} CPU ms")
    return rounds


def close(children: "Iterable[Child]") -> None:
    """Ends the engines and all that they started, together."""
    for child in children:
        child.end()
    for child in children:
        child.wait(CLOSE_SECONDS)


class Child:
    """An engine in a process of its own; its rounds don't overlap with those of the others."""

    def __init__(self, engine: str, data: Path, folder: Path) -> None:
        command = [sys.executable, __file__, "--engine", engine, "--data", str(data), "--folder", str(folder)]
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        # Ray's workers would run at nice 15: on a busy machine all that polls would wait for them, and be counted.
        settings["RAY_worker_niceness"] = "0"
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings},
        )
        self._tree = psutil.Process(self._process.pid)

    def round(self, images: int) -> Round:
        """Lets the engine make `images` images, then waits until its buffers are full again and it rests."""
        assert self._process.stdin and self._process.stdout
        print(images, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("{"):
                self._settle()
                return Round(**json.loads(line))
        raise RuntimeError(f"the engine ended with code {self._process.wait()}")

    def end(self) -> None:
        """Tells the engine to end."""
        assert self._process.stdin
        self._process.stdin.close()

    def wait(self, seconds: float) -> None:
        """Waits for its end, but not for ever."""
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            for process in [*self._tree.children(recursive=True), self._tree]:
                process.kill()

    def _settle(self) -> None:
        deadline, before = time.monotonic() + 30, tree_cpu(self._tree)
        while time.monotonic() < deadline:
            time.sleep(1)
            now = tree_cpu(self._tree)
            if now - before < 0.3:
                return
            before = now


def serve(engine: str, data: Path, folder: Path) -> None:
    """The child's side: for each number read, makes that many images and prints what it took."""
    progress = open_engine(engine, data, folder / engine)
    for line in sys.stdin:
        print(json.dumps(vars(one_round(progress, int(line)))), flush=True)
    progress.close()


def one_round(progress: Iterator[int], images: int) -> Round:
    """Takes batches until `images` more were made.

    Args:
        progress: gives, after each batch that it hands over, how many images were made so far.
        images: after emptying the buffers.
    """
    tree = psutil.Process()
    begin = next(progress)
    warm = begin + min(WARM_IMAGES, images)
    begin = next(made for made in progress if made >= warm)
    cpu, wall = tree_cpu(tree), time.perf_counter()
    end = next(made for made in progress if made >= begin + images)
    return Round(end - begin, tree_cpu(tree) - cpu, time.perf_counter() - wall)


def tree_cpu(root: psutil.Process) -> float:
    """CPU seconds of a process and its descendants, those that ended and were waited for included."""
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:  # it has just ended
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


# ---- engines: each yields how many images were made, once for every batch taken ----


def open_engine(engine: str, data: Path, folder: Path) -> Progress:
    if engine == "decode":
        return decode_only(data)
    if engine.startswith("peer"):
        return peer(data, as_float=engine == "peer-float")
    kind, where = engine.split("-")
    feed = open_feed(data, folder, where)
    return local(feed) if kind == "local" else ray_data(feed, make_config(data, where, folder))


def make_config(data: Path, where: str, folder: Path) -> Config:
    return Config(
        recipe="benchmark",
        data=DataConfig(path=str(data)),
        views=ViewsConfig(where=where),
        optimizer=OptimizerConfig(global_batch_size=BATCH),
        runtime=RuntimeConfig(cache=str(folder / "cache")),
    )


def open_feed(data: Path, folder: Path, where: str) -> Feed:
    config = make_config(data, where, folder)
    return build(config, RunDirectory(folder / "run")).feed


def ray_data(feed: Feed, config: Config) -> Progress:
    import ray
    from ray.data.collate_fn import NumpyBatchCollateFn

    from iwm_ray.loader import to_tensors
    from iwm_ray.runtime import cluster, pipeline

    class ToTensors(NumpyBatchCollateFn):
        def __call__(self, batch: dict[str, np.ndarray]) -> dict:
            return to_tensors(batch)

    assert feed.log is not None
    os.environ.pop("RAY_ADDRESS", None)
    cluster.connect(config)
    layout = pipeline.Layout.of(feed, BATCH, 1, 0, 10**6)
    stream = pipeline.stream(feed, layout)
    stream.context.execution_options = pipeline.execution_options(config.runtime)
    try:
        for _ in range(layout.num_segments):
            for batch in stream.iter_torch_batches(
                batch_size=BATCH, prefetch_batches=4, collate_fn=ToTensors(), device="cpu"
            ):
                yield images_made(feed, int(batch["counter"][0]), layout.block_rows)
    finally:
        ray.shutdown()


def images_made(feed: Feed, handed_over: int, block_rows: int) -> int:
    """Images whose blocks are in the action log. The epochs before that of a batch that was handed over are complete, so
    only the later ones are counted: a look at every file after every batch would be a fiftieth of what is measured."""
    assert feed.log is not None
    epoch, num_blocks = handed_over // feed.plan.samples_per_epoch, 0
    made = epoch * feed.plan.samples_per_epoch
    while (folder := feed.log.folder / f"epoch={epoch:05d}").is_dir():
        num_blocks += sum(name.startswith("rows-") for name in os.listdir(folder))
        epoch += 1
    return made + num_blocks * block_rows


def local(feed: Feed) -> Progress:
    from iwm_ray.loader import local_columns

    for number, _ in enumerate(local_columns(feed, BATCH, 0, 10**6, 2, pin=False), start=1):
        yield number * BATCH


def decode_only(data: Path) -> Progress:
    from iwm_ray.data.decode import DecodeLimits, decode

    encoded = [path.read_bytes() for path in jpeg_files(data)]
    made = 0
    while True:
        for image in encoded:
            decode(image, DecodeLimits())
        made += len(encoded)
        yield made


def peer(data: Path, as_float: bool) -> Progress:
    from torch.utils.data import DataLoader

    images = PeerImages(jpeg_files(data), as_float)
    loader = DataLoader(images, batch_size=BATCH, num_workers=2, shuffle=True)  # type: ignore[arg-type]
    for number, _ in enumerate(loader, start=1):
        yield number * BATCH


class PeerImages:
    """Two views of each image, as the common PIL pipelines make them."""

    def __init__(self, paths: list[Path], as_float: bool) -> None:
        from torchvision import transforms as tv

        config = ViewsConfig()
        jitter = tv.RandomApply(
            [tv.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)],
            p=config.jitter_probability,
        )
        normalise = [tv.ToTensor(), tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        to_tensor = normalise if as_float else [tv.PILToTensor()]
        self._paths = paths
        self._crop = tv.Compose(
            [
                tv.RandomResizedCrop(config.image_size, config.crop_scale, config.crop_ratio),
                tv.RandomHorizontalFlip(config.flip_probability),
            ]
        )
        self._target = tv.Compose([jitter, *to_tensor])
        self._source = tv.Compose(
            [
                jitter,
                tv.RandomGrayscale(config.grayscale_probability),
                tv.RandomApply([PillowBlur(config.blur_radius)], p=config.blur_probability),
                tv.RandomSolarize(config.solarize_threshold, config.solarize_probability),
                *to_tensor,
            ]
        )

    def __len__(self) -> int:
        return 10**8

    def __getitem__(self, i: int) -> tuple:
        from PIL import Image

        crop = self._crop(Image.open(self._paths[i % len(self._paths)]).convert("RGB"))
        return self._source(crop), self._target(crop)


class PillowBlur:
    """Pillow's approximate Gaussian blur: a fifth of the time of torchvision's, and what I-JEPA's code uses."""

    def __init__(self, radius: tuple[float, float]) -> None:
        self._radius = radius

    def __call__(self, image):
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self._radius)))


def jpeg_files(data: Path) -> list[Path]:
    return sorted(path for path in data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))


# ---- pixels ----


def pixel_differences(data: Path, folder: Path, count: int = 64) -> tuple[float, float]:
    """Mean absolute difference, in levels, of our source and target views from torchvision's of the same draws."""
    feed = open_feed(data, folder / "pixels", "host")
    samples = np.arange(min(count, len(feed.index)))
    epochs = np.zeros_like(samples)
    images = [feed.image(int(sample)) for sample in samples]
    heights, widths = np.array([image.shape[:2] for image in images]).T
    draws = feed.policy.draw(feed.seed, epochs, samples, heights, widths)
    ours = feed.make(samples, epochs, samples)
    differences = []
    for i, image in enumerate(images):
        box = feed.policy.crop_box.box(draws, i, *image.shape[:2])
        theirs = torchvision_views(image, box, draws, i, feed.policy.crop_box.size)
        for name, view in zip(("source", "target"), theirs, strict=True):
            differences.append(np.abs(ours[name][i].astype(int) - np.asarray(view)).mean())
    source, target = np.array(differences).reshape(-1, 2).mean(axis=0)
    assert source < 1 and target < 1, (
        f"views differ from torchvision's by {source:.2f} and {target:.2f} levels"
    )
    return float(source), float(target)


def torchvision_views(image: np.ndarray, box: tuple, draws: dict, i: int, size: int) -> tuple:
    """(source, target) of row `i` as Pillow images."""
    from PIL import Image
    from torchvision.transforms import functional as tv

    crop = tv.resized_crop(Image.fromarray(image), *box, [size, size])
    crop = tv.hflip(crop) if draws["flip"][i] else crop
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    names = ("brightness", "contrast", "saturation", "hue")
    views = []
    for view in ("source", "target"):
        made = crop
        for number in draws[f"{view}_order"][i] if draws[f"{view}_jitter"][i] else ():
            made = operations[number](made, float(draws[f"{view}_{names[number]}"][i]))
        views.append(made)
    source, target = views
    if draws["source_grayscale"][i]:
        source = tv.to_grayscale(source, 3)
    if draws["source_blur"][i]:
        radius = float(draws["source_blur_radius"][i])
        source = tv.gaussian_blur(source, 2 * int(np.ceil(3 * radius)) + 1, radius)
    if draws["source_solarize"][i]:
        source = tv.solarize(source, int(draws["source_solarize_threshold"][i]))
    return source, target


# ---- photographs where there are none ----


def synthetic_photos(folder: Path, count: int = 160) -> Path:
    """JPEGs with ImageNet's size, bytes a pixel (0.55) and sampling (mostly 4:4:4), cut from scikit-image's photographs."""
    from PIL import Image
    from skimage import data

    generator = np.random.default_rng(0)
    photos = [getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket", "cat")]
    for number in range(count):
        photo = Image.fromarray(photos[number % len(photos)])
        width, height = (375, 500) if generator.random() < 0.25 else (500, 375)
        scale = generator.uniform(0.5, 1) * min(photo.width / width, photo.height / height)
        left = generator.uniform(0, photo.width - scale * width)
        top = generator.uniform(0, photo.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        cut = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC, box=box)).astype(float)
        grain = Image.fromarray(np.clip(cut + generator.normal(0, 4, cut.shape), 0, 255).astype(np.uint8))
        path = folder / f"class-{number % 8}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(grain, 0.55, 0 if generator.random() < 0.78 else 2))
    return folder


def encode(photo, bytes_per_pixel: float, subsampling: int) -> bytes:
    """The JPEG of the highest quality that stays below that size."""
    low, high, best = 5, 98, b""
    while low <= high:
        quality = (low + high) // 2
        buffer = io.BytesIO()
        photo.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
        if len(buffer.getvalue()) <= bytes_per_pixel * photo.width * photo.height:
            best, low = buffer.getvalue(), quality + 1
        else:
            high = quality - 1
    return best or buffer.getvalue()


# ---- report ----


class Report:
    """Prints figures for people or as JSON lines."""

    def __init__(self, data: Path, as_json: bool) -> None:
        self._data, self._as_json = data, as_json

    def pixels(self, source: float, target: float) -> None:
        if self._as_json:
            self._line(
                "loader-pixels", "levels", ours=max(source, target), limit=1.0, source=source, target=target
            )
        else:
            print(
                f"views differ from torchvision's by {source:.2f} (source) and {target:.2f} (target) levels on average"
            )

    def rates(self, rounds: dict[str, list[Round]]) -> None:
        for engine, own in rounds.items():
            cost = [one.cpu_ms for one in own]
            rate = statistics.median(one.rate for one in own)
            figures: dict = {
                "ours": statistics.median(cost),
                "cost_min": min(cost),
                "cost_max": max(cost),
                "wall": rate,
            }
            for name, other in (("peer", "peer"), ("peer_float", "peer-float"), ("limit", "decode")):
                if other in rounds and other != engine:
                    figures |= compared(name, [one.cpu_ms for one in rounds[other]], cost)
            if self._as_json:
                self._line(f"loader-{engine}", "CPU ms an image", rounds=len(own), **figures)
            else:
                print(describe(engine, figures))

    def _line(self, name: str, unit: str, **figures: float) -> None:
        libraries = ("numpy", "ray", "torch", "torchvision", "pillow", "simplejpeg", "opencv-python-headless")
        versions = {"python": platform.python_version()} | {
            library: version(library) for library in libraries
        }
        line = {"name": name, "unit": unit, **figures, "load": os.getloadavg()[0], "data": self._data.name}
        print(json.dumps(line | {"versions": versions}), flush=True)


def compared(name: str, theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Their cost over ours, round by round."""
    ratios = sorted(their / our for their, our in zip(theirs, ours, strict=True))
    quartile = ratios[len(ratios) // 4]
    found = {name: statistics.median(theirs), f"ratio_{name}": statistics.median(ratios)}
    spread = {"quartile": quartile, "min": ratios[0], "max": ratios[-1]}
    return found | (spread if name == "peer" else {f"{key}_{name}": value for key, value in spread.items()})


def describe(engine: str, figures: dict[str, float]) -> str:
    """`ray-host   2.61 CPU ms an image (2.50 to 2.80), 420 images/s; peer 7.4: 2.84 x (2.7 to 3.0)`"""
    text = f"{engine:13s}{figures['ours']:6.2f} CPU ms an image ({figures['cost_min']:.2f} to {figures['cost_max']:.2f})"
    text += f", {figures['wall']:5.0f} images/s"
    for name in ("peer", "peer_float", "limit"):
        if name in figures:
            low, high = (figures[key if name == "peer" else f"{key}_{name}"] for key in ("min", "max"))
            text += (
                f"; {name} {figures[name]:.2f} = {figures[f'ratio_{name}']:.2f} x ({low:.2f} to {high:.2f})"
            )
    return text


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
