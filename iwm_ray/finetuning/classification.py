"""Classes of whole images: what an arm is trained for, and how it is measured."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from numpy.typing import NDArray
from torch import Tensor, nn

from iwm_ray.evaluation.features import measuring, model_device
from iwm_ray.finetuning.data import Split, in_order, mixed
from iwm_ray.finetuning.fit import Columns
from iwm_ray.finetuning.model import Asking, Tuned, draw_paths
from iwm_ray.finetuning.settings import FinetuneConfig

_MEASURING_STEP = 2**31 - 1
"""names the queries of measuring: none that training reaches"""


@dataclass(frozen=True)
class ClassObjective:
    """Cross-entropy of the classes, the mean over the images that can be decoded (see fit.Objective)."""

    names: tuple[str, ...]
    """the tasks, as the schedule numbers them"""
    num_classes: tuple[int, ...]
    """of each task"""
    schedule: NDArray[np.int64]
    """`[k]` the task of each step"""
    batch_size: int
    """over all workers"""
    asking: Asking
    config: FinetuneConfig
    seed: int

    def count(self, columns: Columns) -> Tensor:
        return columns["weight"].sum()

    def loss(self, tuned: Tuned, forward: nn.Module, columns: Columns, step: int) -> Tensor:
        task, places = int(self.schedule[step]), columns["counter"].numpy() % self.batch_size
        inputs, labels = columns["inputs"], columns["labels"]
        if "partners" in columns:
            partners = columns["partners"], columns["partner_labels"]
            count, augment = self.num_classes[task], self.config.augment
            inputs, labels = mixed(inputs, labels, *partners, count, augment, self.seed, step)
        draw_paths(tuned, self.seed, step, places, inputs.device)
        query = self.asking.query(places, self.seed, step, inputs.device)
        logits = forward(inputs, self.names[task], query).float()
        losses = F.cross_entropy(
            logits, labels, reduction="none", label_smoothing=self.config.label_smoothing
        )
        return (columns["weight"] * losses).sum()


def measure(
    tuned: Tuned,
    task: str,
    split: Split,
    asking: Asking,
    batch_size: int,
    cast: Callable[[], AbstractContextManager],
) -> NDArray[np.bool_]:
    """`[k]` whether each readable image is classified rightly; the queries are the same in every call."""
    device, right = model_device(tuned), []
    with measuring(tuned):
        for number, drawn in enumerate(in_order(split, batch_size)):
            query = asking.query(len(drawn.inputs), number, _MEASURING_STEP, device)
            with cast():
                logits = tuned(drawn.inputs.to(device), task, query)
            right.append((logits.argmax(1).cpu() == drawn.labels).numpy())
    return np.concatenate(right)
