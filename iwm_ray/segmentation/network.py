"""The network of a segmentation: encoder, predictor and a head on the grid; its training and its measuring."""

import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW

from iwm_ray.config import RuntimeConfig
from iwm_ray.errors import RunError, UsageError
from iwm_ray.evaluation.features import measuring, model_device
from iwm_ray.finetuning.fit import rate_share
from iwm_ray.finetuning.model import (
    Query,
    Start,
    Tuned,
    parameter_groups,
    pretrained_predictor,
    random_predictor,
    seeded,
)
from iwm_ray.finetuning.settings import Tune
from iwm_ray.model.encoder import Encoder, sincos_positions
from iwm_ray.model.iwm import IWM
from iwm_ray.model.predictor import Predictor
from iwm_ray.model.segmentation_heads import LinearSegmentation, PyramidSegmentation, upsample
from iwm_ray.segmentation.data import IGNORED, Pairs
from iwm_ray.segmentation.settings import HeadName, SegmentConfig
from iwm_ray.trained import Trained
from iwm_ray.training.loop import autocast

TASK = "pixels"
"""the one task of the network"""

Report = Callable[[int, float], None]
"""called now and then with steps done and loss"""


def image_size(trained: Trained, config: SegmentConfig) -> int:
    """Side of the images, pixels.

    Raises:
        UsageError: not a multiple of the patch.
    """
    run = trained.config
    size = config.image_size or run.views.image_size
    if size % run.encoder.patch_size:
        raise UsageError(
            f"--image-size {size}: not a multiple of the patch of {run.encoder.patch_size} pixels; give one"
        )
    return size


def assemble(
    trained: Trained, model: IWM, config: SegmentConfig, tune: Tune, start: Start, num_classes: int, seed: int
) -> Tuned:
    """The network of one arm; the head depends on the seed alone, not on the predictor.

    Args:
        trained: where the model comes from.
        model: its weights; they are copied, not changed.
        config: the segmentation.
        tune: what is trained besides the head.
        start: the predictor's weights.
        num_classes: of pixels.
        seed: of the head and a random predictor.
    """
    encoder = deepcopy(model.target_encoder if config.encoder == "target" else model.encoder)
    predictor = None
    if start == "pretrained":
        predictor = pretrained_predictor(trained, model, encoder, seed)
    elif start == "random":
        predictor = random_predictor(trained, encoder, seed)
    spread_positions(encoder, predictor, image_size(trained, config) // encoder.patch_size)
    with seeded(seed, "head", 0):
        head = make_head(config.head, encoder, num_classes)
    return Tuned(encoder, predictor, {TASK: head}, {}, is_frozen=tune == "predictor")


def spread_positions(encoder: Encoder, predictor: Predictor | None, side: int) -> None:
    """Fits a model to a grid of side x side patches: its fixed positions keep the extent that it knows.

    Positions beyond those of pretraining would be new to it; ones between them are near to known ones.
    """
    spacing = encoder.grid[0] / side
    encoder.grid = (side, side)

    def positions(width: int) -> Tensor:
        return sincos_positions(encoder.grid, width, spacing)

    encoder.vit.pos_embed = nn.Parameter(positions(encoder.width)[None], requires_grad=False)
    if predictor is not None:
        predictor.positions = nn.Parameter(positions(predictor.mask_token.shape[0]), requires_grad=False)


def make_head(kind: HeadName, encoder: Encoder, num_classes: int) -> nn.Module:
    """A head on tokens of the encoder's width and grid."""
    kinds = {"linear": LinearSegmentation, "upernet": PyramidSegmentation}
    return kinds[kind](encoder.width, num_classes, encoder.grid)


def logits(tuned: Tuned, images: Tensor, action_dim: int) -> Tensor:
    """`[b 3 s s]` uint8 images -> `[b c s s]` float32; the predictor is asked with the null action."""
    query = Query(torch.zeros(len(images), action_dim, device=images.device))
    return upsample(tuned(images, TASK, query).float(), (images.shape[2], images.shape[3]))


@dataclass(frozen=True)
class Fitted:
    """What a training cost."""

    loss: float
    """mean of the last tenth of the steps"""
    images_per_second: float


def fit(
    tuned: Tuned,
    pairs: Pairs,
    config: SegmentConfig,
    start: Start,
    action_dim: int,
    seed: int,
    report: Report,
) -> Fitted:
    """Trains what is not frozen, on the device where it lies; the same bits for the same seed.

    Raises:
        RunError: the loss is not finite.
    """
    device, runtime = model_device(tuned), RuntimeConfig(precision=config.runtime.precision)
    optimizer = AdamW(parameter_groups(tuned, config, start), betas=(0.9, 0.999), fused=True)
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    losses, num_images, begin = [], 0, time.monotonic()
    tuned.train()
    for step in range(config.steps):
        images, classes = (each.to(device) for each in pairs.batch(step, config.batch_size, seed))
        rate = config.lr * rate_share(step, config.steps, config.warmup_fraction)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        with autocast(runtime, device):
            predicted = logits(tuned, images, action_dim)
        loss = pixel_loss(predicted, classes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.clip_grad_norm:
            nn.utils.clip_grad_norm_(trained, config.clip_grad_norm)
        optimizer.step()
        losses.append(loss.detach())
        num_images += len(images)
        if step % 10 == 9 or step + 1 == config.steps:
            value = float(losses[-1])
            if not math.isfinite(value):
                raise RunError(
                    f"the loss is {value} after {step + 1} steps at learning rate {rate:g}; lower --lr"
                )
            report(step + 1, value)
    last = torch.stack(losses[-max(1, config.steps // 10) :]).mean()
    return Fitted(float(last), num_images / (time.monotonic() - begin))


def pixel_loss(predicted: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of `[b c s s]` logits and `[b s s]` classes, the mean over pixels that count; 0 without any."""
    total = F.cross_entropy(predicted, classes, ignore_index=IGNORED, reduction="sum")
    return total / (classes != IGNORED).sum().clamp(min=1)


def predict(
    tuned: Tuned, pairs: Pairs, places: NDArray[np.int64], action_dim: int, precision: RuntimeConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Images `[b 3 s s]` uint8, their classes `[b s s]` and the predicted ones, all on the CPU."""
    images, classes, _ = pairs.read(places, np.zeros_like(places), 0)
    device = model_device(tuned)
    with measuring(tuned), autocast(precision, device):
        predicted = logits(tuned, images.to(device), action_dim).argmax(1).cpu()
    return images, classes, predicted


def measure(tuned: Tuned, pairs: Pairs, config: SegmentConfig, action_dim: int) -> NDArray[np.int64]:
    """`[k 3 c]` of each readable image: pixels of each class that are right, that are predicted, that there are."""
    runtime, num_classes = RuntimeConfig(precision=config.runtime.precision), len(pairs.classes.names)
    counts = []
    for first in range(0, len(pairs), config.batch_size):
        places = np.arange(first, min(first + config.batch_size, len(pairs)))
        _, classes, predicted = predict(tuned, pairs, places, action_dim, runtime)
        counts += [
            count_pixels(found.numpy(), asked.numpy(), num_classes)
            for found, asked in zip(predicted, classes, strict=True)
        ]
    return np.stack(counts)


def count_pixels(
    predicted: NDArray[np.int64], classes: NDArray[np.int64], num_classes: int
) -> NDArray[np.int64]:
    """`[3 c]`, see `measure`; pixels whose class is IGNORED don't count."""
    counted = classes != IGNORED
    predicted, classes = predicted[counted], classes[counted]
    each = (classes[predicted == classes], predicted, classes)
    return np.stack([np.bincount(values, minlength=num_classes) for values in each])
