"""Training and measuring of one network; plain torch, the same bits for the same seed."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import psutil
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW

from iwm_ray.errors import RunError
from iwm_ray.evaluation.features import measuring, model_device
from iwm_ray.finetuning.data import Rows, Step, in_order, mixed
from iwm_ray.finetuning.model import Asking, Start, Tuned, parameter_groups
from iwm_ray.finetuning.settings import FinetuneConfig

_MEASURING_STEP = 2**31 - 1
"""names the queries of measuring: none that training reaches"""

Report = Callable[[int, int, float], None]
"""called now and then with steps done, images done and loss"""


@dataclass(frozen=True)
class Fitted:
    """What a training cost."""

    loss: float
    """mean of the last tenth of the steps"""
    num_images: int
    seconds: float
    peak_memory: int
    """bytes: of the GPU where there is one, else of the whole process"""


def fit(
    tuned: Tuned,
    names: Sequence[str],
    batches: Iterator[Step],
    num_steps: int,
    config: FinetuneConfig,
    start: Start,
    peak_lr: float,
    asking: Asking,
    seed: int,
    report: Report,
    cast: Callable[[], AbstractContextManager],
) -> Fitted:
    """Trains what is not frozen, on the device where it lies.

    Args:
        tuned: is changed.
        names: the tasks, as the batches number them.
        batches: one for each step.
        num_steps: length of the schedule.
        config: rates and augmentation.
        start: of the predictor (see parameter_groups).
        peak_lr: of what starts at random.
        asking: makes the queries.
        seed: of the queries, and of mixup and cutmix.
        report: see Report.
        cast: makes the context of forward passes (autocast).

    Raises:
        RunError: the loss is not finite.
    """
    device = model_device(tuned)
    optimizer = AdamW(parameter_groups(tuned, config, start), betas=(0.9, 0.999), fused=True)
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    memory = _Memory(device)
    losses: list[Tensor] = []
    num_images, begin = 0, time.monotonic()
    tuned.train()
    for number, batch in enumerate(batches):
        rate = peak_lr * rate_share(number, num_steps, config.warmup_fraction)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss = _loss(tuned, names[batch.task], batch, config, asking, seed, number, cast)
        memory.look()
        # Heads of other tasks have no gradient at all: neither moments nor weight decay touch them.
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.clip_grad_norm:
            nn.utils.clip_grad_norm_(trained, config.clip_grad_norm)
        optimizer.step()
        losses.append(loss.detach())
        num_images += len(batch.inputs)
        if number % 10 == 9 or number + 1 == num_steps:
            value = float(losses[-1])
            if not math.isfinite(value):
                raise RunError(
                    f"the loss is {value} after {number + 1} steps at learning rate {rate:g}; lower --lr"
                )
            report(number + 1, num_images, value)
    seconds = time.monotonic() - begin
    last = torch.stack(losses[-max(1, num_steps // 10) :]).mean()
    return Fitted(float(last), num_images, seconds, memory.peak())


def rate_share(step: int, num_steps: int, warmup_fraction: float) -> float:
    """The learning rate as a share of its peak: a linear rise, then half a cosine to 0."""
    warmup = warmup_fraction * num_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, num_steps - warmup)))


def measure(
    tuned: Tuned,
    task: str,
    rows: Rows,
    asking: Asking,
    batch_size: int,
    cast: Callable[[], AbstractContextManager],
) -> NDArray[np.bool_]:
    """`[k]` whether each readable image is classified rightly; the queries are the same in every call."""
    device, right = model_device(tuned), []
    with measuring(tuned):
        for number, drawn in enumerate(in_order(rows, batch_size)):
            query = asking.query(len(drawn.inputs), number, _MEASURING_STEP, device)
            with cast():
                logits = tuned(drawn.inputs.to(device), task, query)
            right.append((logits.argmax(1).cpu() == drawn.labels).numpy())
    return np.concatenate(right)


def _loss(
    tuned: Tuned,
    task: str,
    batch: Step,
    config: FinetuneConfig,
    asking: Asking,
    seed: int,
    step: int,
    cast: Callable[[], AbstractContextManager],
) -> Tensor:
    device = model_device(tuned)
    inputs, labels = batch.inputs.to(device), batch.labels.to(device)
    if inputs.ndim == 4:
        num_classes = tuned.head(task).classify.out_features  # type: ignore[union-attr]
        inputs, labels = mixed(inputs, labels, int(num_classes), config.augment, seed, step)  # type: ignore[arg-type]
    query = asking.query(len(inputs), seed, step, device)
    with cast():
        logits = tuned(inputs, task, query)
    return F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)


class _Memory:
    """The most memory in use since the start, looked at when a step's activations are all there."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._process, self._peak = device, psutil.Process(), 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def look(self) -> None:
        if self._device.type != "cuda":
            self._peak = max(self._peak, self._process.memory_info().rss)

    def peak(self) -> int:
        """Bytes."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else self._peak
