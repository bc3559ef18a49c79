"""Labelled images of one or several tasks: as cached tokens of a frozen encoder, or as images read at every step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from iwm_ray.config import Config
from iwm_ray.data.decode import DecodeLimits
from iwm_ray.data.index import Index
from iwm_ray.data.plan import Plan, permute
from iwm_ray.data.quarantine import Quarantine, decode_noting
from iwm_ray.data.read import Reader
from iwm_ray.data.splits import refuse_shared_images, refuse_unknown_classes, refuse_unreadable
from iwm_ray.errors import RunError, UsageError
from iwm_ray.evaluation.encoders import FrozenEncoder
from iwm_ray.evaluation.features import Features, measuring
from iwm_ray.feed import Columns
from iwm_ray.finetuning.images import channels_first
from iwm_ray.finetuning.settings import AugmentConfig, FinetuneConfig
from iwm_ray.randomness import integers, uniforms
from iwm_ray.views.resize import clean_view

_READ_AT_ONCE = 256
NUM_TRIED = 16
"""images of each set that are read before anything begins"""
_CHOICE_EPOCH = 2**31 - 2
"""names the permutation from which images are chosen: none that training reaches"""


class Drawn(NamedTuple):
    """Some rows."""

    inputs: Tensor
    """`[b n d]` float32 tokens, or `[b 3 s s]` uint8 images"""
    labels: Tensor
    """`[b]` int64"""
    samples: NDArray[np.int64]
    """`[b]` sample numbers in the index"""
    readable: NDArray[np.bool_]
    """`[b]` whether there is an image; one that cannot be decoded is black"""

    def readable_only(self) -> "Drawn":
        """Without the images that cannot be decoded."""
        kept = self.readable
        if kept.all():
            return self
        return Drawn(self.inputs[kept], self.labels[kept], self.samples[kept], kept[kept])


class Split(Protocol):
    """The images of one split of a task, in some form."""

    def __len__(self) -> int: ...

    @property
    def view_bytes(self) -> int: ...

    def rows(self, places: NDArray[np.int64], epochs: NDArray[np.int64], seed: int) -> Drawn:
        """`[b]` places in the split and passes over it -> these rows, augmented by draws of that seed."""
        ...


@dataclass(frozen=True)
class ImageRows:
    """Images that are read, decoded and augmented when they are asked for."""

    index: Index
    samples: NDArray[np.int64]
    """`[k]` sample numbers in the index"""
    labels: NDArray[np.int64]
    """`[k]` classes of the task, 0 and more"""
    size: int
    """side of the images, pixels"""
    limits: DecodeLimits
    augment: AugmentConfig | None = None
    """None: the full, untransformed image (its middle square, resized)"""
    quarantine: Quarantine | None = None
    """where images that cannot be decoded are noted; None: nowhere"""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def view_bytes(self) -> int:
        """Bytes of an image."""
        return 3 * self.size**2

    def rows(self, places: NDArray[np.int64], epochs: NDArray[np.int64], seed: int) -> Drawn:
        samples = self.samples[places]
        images = torch.zeros(len(places), 3, self.size, self.size, dtype=torch.uint8)
        found = np.zeros(len(places), np.bool_)
        for i, image in decode_noting(self._reader, self.index, samples, self.limits, self.quarantine):
            images[i] = self._transform(image, _draws(seed, epochs[i : i + 1], samples[i : i + 1])[0])
            found[i] = True
        return Drawn(images, torch.from_numpy(self.labels[places]), samples, found)

    @property
    def judged_labels(self) -> NDArray[np.int64]:
        """Classes of the images that are not noted as undecodable."""
        noted = {record["row_id"] for record in self.quarantine.records()} if self.quarantine else set()
        if not noted:
            return self.labels
        return self.labels[[self.index.row_id(int(sample)) not in noted for sample in self.samples]]

    def part(self, start: int, stop: int) -> "ImageRows":
        """Rows `start` to `stop` - 1 alone."""
        return replace(self, samples=self.samples[start:stop], labels=self.labels[start:stop])

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.index)

    def _transform(self, image: NDArray[np.uint8], draws: NDArray[np.float64]) -> Tensor:
        """`[h w 3]` and the image's `[2]` draws -> `[3 s s]` uint8."""
        augment = self.augment
        if augment is None:
            return channels_first(clean_view(image, self.size))
        from torchvision.transforms import v2  # seconds to load, and only augmentation needs it

        steps: list[nn.Module] = []
        if augment.crop_area < 1:
            steps.append(v2.RandomResizedCrop(self.size, scale=(augment.crop_area, 1.0), antialias=True))
        else:
            image = clean_view(image, self.size)
        if augment.randaugment:
            steps.append(v2.RandAugment(num_ops=2, magnitude=augment.randaugment))
        pixels = channels_first(image)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(draws[0] * 2**53))
            for step in steps:
                pixels = step(pixels)
        return pixels.flip(2) if draws[1] < augment.flip_probability else pixels


@dataclass(frozen=True)
class Tokens:
    """Tokens of a frozen encoder, computed once, found by the numbers of their samples."""

    plain: Features
    """of the images; what could not be decoded is not among them"""
    flipped: Features | None = None
    """of the mirrored images; None: none is ever asked for"""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image's tokens, `(n, d)`."""
        return tuple(self.plain.values.shape[1:])

    def read(
        self, samples: NDArray[np.int64], turned: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Some images' tokens.

        Args:
            samples: `[b]` sample numbers in the index.
            turned: `[b]` whether the mirrored image is meant.

        Returns:
            `[b n d]`, 0 where the image could not be decoded, and `[b]` whether it could.
        """
        tokens = np.zeros((len(samples), *self.shape), np.float32)  # float16 on the disk
        readable = np.zeros(len(samples), np.bool_)
        for features, numbers, meant in zip(
            (self.plain, self.flipped), self._places, (~turned, turned), strict=True
        ):
            if features is None:
                continue
            at = np.array([numbers.get(int(sample), -1) for sample in samples], np.int64)
            there = meant & (at >= 0)
            tokens[there] = features.values[at[there]]
            readable |= there
        return tokens, readable

    @cached_property
    def _places(self) -> tuple[dict[int, int], dict[int, int]]:
        """Sample number -> row, of each of the two."""
        plain, flipped = (
            {} if features is None else {int(sample): place for place, sample in enumerate(features.samples)}
            for features in (self.plain, self.flipped)
        )
        return plain, flipped


@dataclass(frozen=True)
class TokenRows:
    """Tokens in place of images."""

    samples: NDArray[np.int64]
    """`[k]` sample numbers in the index"""
    labels: NDArray[np.int64]
    """`[k]` classes of the task, 0 and more"""
    tokens: Tokens
    """of these images, and perhaps of others"""
    flip_probability: float = 0.0

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def view_bytes(self) -> int:
        """Bytes of an image's tokens."""
        return 4 * int(np.prod(self.tokens.shape))

    def rows(self, places: NDArray[np.int64], epochs: NDArray[np.int64], seed: int) -> Drawn:
        samples = self.samples[places]
        turned = np.zeros(len(places), np.bool_)
        if self.flip_probability:
            turned = _draws(seed, epochs, samples)[:, 1] < self.flip_probability
        tokens, readable = self.tokens.read(samples, turned)
        return Drawn(torch.from_numpy(tokens), torch.from_numpy(self.labels[places]), samples, readable)


def _draws(seed: int, epochs: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.float64]:
    """`[b 2]` numbers in [0, 1) for the augmentation of each image in its epoch."""
    drawn = np.empty((len(samples), 2))
    for epoch in np.unique(epochs):
        drawn[epochs == epoch] = uniforms(seed, int(epoch), samples[epochs == epoch], "finetune", 2)
    return drawn


@dataclass(frozen=True)
class Task:
    """One data set to tune for."""

    name: str
    class_names: tuple[str, ...]
    train: ImageRows
    """in a fixed random order, so that its last part can be held out"""
    test: ImageRows

    def num_held_out(self, share: float) -> int:
        """Training images on which learning rates are judged."""
        return min(max(1, round(share * len(self.train))), len(self.train) - 1)


def open_tasks(config: FinetuneConfig, run: Config, cache: Path) -> list[Task]:
    """Opens every data set.

    Args:
        config: the finetuning.
        run: the configuration of the pretraining: size of the images, limits of decoding.
        cache: folder of the data indices.

    Raises:
        UsageError: no data, names that don't fit together, no labels, test images of any task that one is trained on.
    """
    train, test = (
        named_paths("data.path", config.data.path),
        named_paths("data.test_path", config.data.test_path),
    )
    if not train or not test:
        missing = "--data.path" if not train else "--data.test-path"
        raise UsageError(f"{missing} is missing: give the labelled images to train and to test on")
    if len(train) != len(test) or (list(train) != list(test) and len(train) > 1):
        raise UsageError(
            f"--data.test-path names {' '.join(test)}, --data.path {' '.join(train)}; give NAME=PATH for both, in the "
            "same order"
        )
    pairs = zip(train.items(), test.values(), strict=True)
    tasks = [_open_task(config, run, cache, name, path, test_path) for (name, path), test_path in pairs]
    for task, test_path in zip(tasks, test.values(), strict=True):
        words, tested = f"--data.test-path {test_path}", task.test
        for trained in (other.train for other in tasks):  # one predictor may be trained on all
            refuse_shared_images(words, trained.index, trained.samples, tested.index, tested.samples)
    return tasks


def named_paths(setting: str, words: Sequence[str]) -> dict[str, str]:
    """`NAME=PATH` or `PATH` words -> name -> path; without NAME, the data set is called after its file or folder.

    Raises:
        UsageError: two of the same name.
    """
    paths: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not name.replace("_", "").replace("-", "").isalnum():
            name, path = _name_of(word), word
        if name in paths:
            raise UsageError(
                f"--{setting.replace('_', '-')}: two data sets are called {name!r}; give NAME=PATH"
            )
        paths[name] = path
    return paths


def _name_of(path: str) -> str:
    parts = [part for part in path.replace(":", "/").split("/") if part]
    stem = parts[-1].partition(".")[0] if parts else ""
    if stem in ("train", "test", "val", "validation") and len(parts) > 1:
        stem = parts[-2]
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in stem) or "data"


def _open_task(
    config: FinetuneConfig, run: Config, cache: Path, name: str, path: str, test_path: str
) -> Task:
    columns = {"image_column": config.data.image_column, "label_column": config.data.label_column}
    data = run.data.model_copy(update={"path": path, "test_path": test_path, **columns})
    train, test = (Index.open(data, where, cache) for where in (path, test_path))
    if not train.class_names:
        raise UsageError(
            f"--data.path {path}: the images have no labels; give a folder with one folder for each class, or a Parquet "
            "file and the name of its --data.label-column"
        )
    words = f"--data.test-path {test_path}"
    refuse_unknown_classes(words, train, test)
    limits = DecodeLimits.from_config(data)

    def rows(index: Index, count: int) -> ImageRows:
        labels = index.labels_in(train.class_names).astype(np.int64)
        order = permute(0, _CHOICE_EPOCH, np.arange(len(index)), len(index))
        chosen = order[labels[order] >= 0]
        chosen = chosen[: count or len(chosen)]
        return ImageRows(index, chosen, labels[chosen], run.views.image_size, limits)

    task = Task(name, train.class_names, rows(train, config.data.num_train), rows(test, config.data.num_test))
    if config.data.num_train == 1:
        raise UsageError("--data.num-train 1: one image alone cannot be told from others; give 2 or more")
    if len(task.train) < 2:
        raise UsageError(
            f"--data.path {path}: {len(task.train)} labelled images; training needs 2 or more, give others"
        )
    if not len(task.test):
        raise UsageError(
            f"{words}: no image of a class of --data.path {path}; give labelled images of the same class names"
        )
    for setting, split in ((f"--data.path {path}", task.train), (words, task.test)):
        refuse_unreadable(setting, split.index, split.samples[:NUM_TRIED], limits)
    return task


class Images(Protocol):
    """Some images of a data set."""

    @property
    def index(self) -> Index: ...

    @property
    def samples(self) -> NDArray[np.int64]:
        """`[k]` sample numbers in the index."""
        ...

    @property
    def limits(self) -> DecodeLimits: ...

    @property
    def quarantine(self) -> Quarantine | None:
        """Where those that cannot be decoded are noted."""
        ...


Extract = Callable[[FrozenEncoder, Images], Features]
"""makes the tokens `[k n d]` of a frozen encoder for those of the images that can be read"""


def encode(encoder: FrozenEncoder, images: Images, batch_size: int = _READ_AT_ONCE) -> Features:
    """Tokens of a frozen encoder for every readable image, in their order; in this process, on the CPU.

    Args:
        encoder: whose tokens.
        images: as they are.
        batch_size: images in one forward pass.

    Raises:
        RunError: none of the images can be read.
    """
    model, reader = encoder.load(), Reader(images.index)
    values, samples = [], []
    with measuring(model):
        for places in _in_parts(len(images.samples), batch_size):
            asked, views, found = images.samples[places], [], []
            for place, image in decode_noting(reader, images.index, asked, images.limits, None):
                views.append(channels_first(encoder.view(image)))
                found.append(asked[place])
            if found:
                values.append(model.tokens(torch.stack(views))[0].numpy())
                samples.append(np.array(found))
    if not values:
        raise RunError(f"not one of the {len(images.samples)} images could be decoded; look at the data")
    known = np.concatenate(samples)
    labels, names = images.index.labels[known].astype(np.int64), images.index.class_names
    return Features(np.concatenate(values), labels, known, names, encoder.hash)


_LATE = "could not be read when its tokens were made; remove the tokens (runtime.cache) to use it"


def note_missing(images: Images, found: Features) -> None:
    """Reads images that have no features once more, which notes why: the features may have been made for another tuning.
    Those that can be read by now are noted too, for the features do without them."""
    index, quarantine = images.index, images.quarantine
    if quarantine is None:
        return
    noted = {record["row_id"] for record in quarantine.records()}
    absent = images.samples[~np.isin(images.samples, found.samples)]
    missing = np.array([sample for sample in absent if index.row_id(int(sample)) not in noted], np.int64)
    reader = Reader(index)
    for places in _in_parts(len(missing), _READ_AT_ONCE):
        asked = missing[places]
        late = [int(asked[i]) for i, _ in decode_noting(reader, index, asked, images.limits, quarantine)]
        quarantine.note(index, dict.fromkeys(late, _LATE))


def in_order(split: Split, batch_size: int) -> Iterator[Drawn]:
    """Every readable row once, for measuring; a batch is never empty.

    Raises:
        RunError: none of the images can be read.
    """
    is_empty = True
    for places in _in_parts(len(split), batch_size):
        drawn = split.rows(places, np.zeros_like(places), 0).readable_only()
        if len(drawn.labels):
            is_empty = False
            yield drawn
    if is_empty:
        raise RunError(f"not one of the {len(split)} images could be decoded; look at the data")


def _in_parts(count: int, size: int) -> Iterator[NDArray[np.int64]]:
    for first in range(0, count, size):
        yield np.arange(first, min(first + size, count))


@dataclass(frozen=True)
class Steps:
    """The rows of every step of an arm: a function of the seed, so that two arms see the same data (see feed.Rows)."""

    tasks: tuple[Split, ...]
    schedule: NDArray[np.int64]
    """`[k]` the task of each step"""
    batch_size: int
    seed: int
    has_partners: bool = False
    """whether a row brings the one before it in the batch too (the first: the last), to be mixed with it"""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, nearly."""
        return (2 if self.has_partners else 1) * self.view_bytes

    @property
    def view_bytes(self) -> int:
        """Bytes of a row in its largest column."""
        return max(split.view_bytes for split in self.tasks)

    def rows(self, counters: NDArray[np.int64]) -> Columns:
        """Rows of one step.

        Args:
            counters: `[b]` step x batch_size + place in the batch.

        Returns:
            `counter [b]`, `inputs` (see Drawn), `labels [b]`, `weight [b]` float32 (0: the image cannot be decoded)
            and, with partners, `partners` and `partner_labels`.
        """
        step, size = int(counters[0]) // self.batch_size, self.batch_size
        places = counters - step * size
        split = self.tasks[self.schedule[step]]
        before = int((self.schedule[:step] == self.schedule[step]).sum())
        partners = (places - 1) % size
        asked = np.unique(np.concatenate((places, partners) if self.has_partners else (places,)))
        plan, own = Plan(self.seed, len(split), size), before * size + asked
        drawn = split.rows(plan.samples(own), plan.locate(own)[0], self.seed)
        inputs, labels, at = drawn.inputs.numpy(), drawn.labels.numpy(), np.searchsorted(asked, places)
        columns = {
            "inputs": inputs[at],
            "labels": labels[at],
            "weight": drawn.readable[at].astype(np.float32),
        }
        if self.has_partners:
            at = np.searchsorted(asked, partners)
            columns |= {"partners": inputs[at], "partner_labels": labels[at]}
        return {"counter": counters} | columns


def alternate(num_steps: Sequence[int]) -> NDArray[np.int64]:
    """The task of each step: every task has its number of steps, spread evenly over the whole.

    Args:
        num_steps: steps of each task.
    """
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in num_steps if count])
    tasks = np.concatenate([np.full(count, task) for task, count in enumerate(num_steps)])
    return tasks[np.lexsort((tasks, places))]


def mixed(
    images: Tensor,
    labels: Tensor,
    partners: Tensor,
    partner_labels: Tensor,
    num_classes: int,
    augment: AugmentConfig,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of each image with its partner; the draws are those of the step, one for all.

    Returns:
        `[b 3 s s]` float in 0..1 and `[b c]` shares of the classes.
    """
    from torchvision.transforms import v2

    ways = [(v2.MixUp, augment.mixup), (v2.CutMix, augment.cutmix)]
    choices = [way(alpha=alpha, num_classes=num_classes) for way, alpha in ways if alpha]
    # torchvision mixes each row with the one before it.
    together = torch.stack((partners, images), 1).flatten(0, 1) / 255
    names = torch.stack((partner_labels, labels), 1).flatten()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(integers(seed, step, "mix", 1)[0] >> np.uint64(11)))
        way = choices[int(torch.randint(len(choices), ()))]
        together, shares = way(together, names)
    return together[1::2], shares[1::2]
