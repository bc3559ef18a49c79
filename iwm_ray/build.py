"""From a configuration to the objects of a run: the one place where parts are put together."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from iwm_ray.action_log import ActionLog
from iwm_ray.config import Config, RuntimeConfig
from iwm_ray.data.decode import DecodeLimits, Undecodable, decode
from iwm_ray.data.index import Index
from iwm_ray.data.plan import Plan
from iwm_ray.data.quarantine import Quarantine
from iwm_ray.data.read import Reader
from iwm_ray.errors import RunError, UsageError
from iwm_ray.feed import Feed, Image
from iwm_ray.model.iwm import build_model
from iwm_ray.randomness import integers
from iwm_ray.run_directory import RunDirectory
from iwm_ray.views.masks import MaskSampler
from iwm_ray.views.policy import ViewPolicy
from iwm_ray.views.resize import clean_view

MEASURING_EPOCH = 2**31 - 1
"""The epoch under which monitors draw their views: none that training ever reaches."""


@dataclass(frozen=True)
class Setup:
    """A run, resolved: what every process that takes part in it receives."""

    config: Config
    run: RunDirectory
    feed: Feed
    test_index: Index | None
    total_steps: int
    encoder_width: int
    """token width of the encoder"""

    @property
    def policy(self) -> ViewPolicy:
        return self.feed.policy

    @property
    def runtime(self) -> RuntimeConfig:
        return self.config.runtime

    @property
    def batch_size(self) -> int:
        """Images of a step, over all workers."""
        return self.config.optimizer.global_batch_size

    @property
    def data_processes(self) -> int:
        """Without Ray: processes that make the views."""
        return self.runtime.data_workers or max(1, (os.cpu_count() or 1) // 2)


def cache_folder(config: Config) -> Path:
    """Where data indices are kept: an absolute path, since the working directories of Ray's processes are others."""
    return Path(config.runtime.cache).expanduser().absolute()


def build(config: Config, run: RunDirectory, progress: Callable[[int], None] | None = None) -> Setup:
    """Opens the data and checks everything that can be checked without starting a worker.

    Raises:
        UsageError: no data, too little of it, or settings that don't fit together.
    """
    masks = MaskSampler.from_config(config.masks, config.grid)
    policy = ViewPolicy.from_config(config.views)
    if not config.data.path:
        raise UsageError(
            f"recipe {config.recipe} needs --data.path: a class-folder tree, Parquet file(s) or WebDataset shards"
        )
    cache = cache_folder(config)
    index = Index.open(config.data, config.data.path, cache, progress)
    size = config.optimizer.global_batch_size
    if len(index) < size:
        raise UsageError(
            f"optimizer.global_batch_size {size} is more than the {len(index)} images under data.path "
            f"{config.data.path}; lower it to at most {len(index)}"
        )
    test_index = (
        Index.open(config.data, config.data.test_path, cache, progress) if config.data.test_path else None
    )
    feed = Feed(
        seed=config.seed,
        plan=Plan(config.seed, len(index), size),
        index=index,
        policy=policy,
        masks=masks,
        limits=DecodeLimits.from_config(config.data),
        where=config.views.where,
        log=ActionLog(run.actions, run.path.name, config.tracking.action_log_fraction),
        quarantine=Quarantine(run.quarantine),
    )
    with torch.device("meta"):  # a wrong name or size is found here, not in a worker
        width = build_model(config, policy.action_dim).encoder.width
    return Setup(config, run, feed, test_index, config.total_steps(len(index)), width)


@dataclass(frozen=True)
class Held:
    """Images held for measuring, clean."""

    images: NDArray[np.uint8]
    """`[k s s 3]` shorter side resized, centre cropped"""
    labels: NDArray[np.int32]
    """`[k]` classes of the training data, -1: none"""
    samples: NDArray[np.int64]
    """`[k]` sample numbers in the index they come from"""


def choose(seed: int, index: Index, count: int, purpose: str, offset: int = 0) -> NDArray[np.int64]:
    """Numbers of at most `count` samples of an index; arguments as of `hold`."""
    key = int(integers(seed, MEASURING_EPOCH, purpose, 1)[0] >> np.uint64(33))
    places = np.arange(offset, min(offset + count, len(index)))
    return Plan(key, len(index), len(index)).samples(places)


def hold(setup: Setup, index: Index, count: int, purpose: str, offset: int = 0) -> Held:
    """A fixed random choice of readable images.

    Args:
        count: how many at most.
        purpose: key of the choice; different choices of one purpose and different `offset` don't overlap.
        offset: how many of the choice to pass over.

    Raises:
        RunError: fewer than two images could be read.
    """
    chosen = choose(setup.config.seed, index, count, purpose, offset)
    images: list[Image] = []
    samples: list[int] = []
    for sample, data in zip(chosen, Reader(index).read_many(chosen), strict=True):
        with suppress(Undecodable):
            if isinstance(data, Undecodable):
                raise data
            images.append(clean_view(decode(data, setup.feed.limits), setup.config.views.image_size))
            samples.append(int(sample))
    if len(images) < 2:
        raise RunError(
            f"only {len(images)} of {len(chosen)} images chosen for measuring could be read, two are needed; "
            "give more images under data.path or data.test_path"
        )
    labels = index.labels_in(setup.feed.index.class_names)
    return Held(np.stack(images), labels[np.array(samples)], np.array(samples, np.int64))
