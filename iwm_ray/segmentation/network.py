"""The network of a segmentation: encoder, predictor and a head on the grid; its training and its measuring."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from numpy.typing import NDArray
from torch import Tensor, nn

from iwm_ray.config import RuntimeConfig
from iwm_ray.errors import RunError, UsageError
from iwm_ray.evaluation.encoders import RunTokens, TokenModel
from iwm_ray.evaluation.features import digest, measuring, model_device
from iwm_ray.finetuning.fit import Columns
from iwm_ray.finetuning.model import Query, Start, Tuned, pretrained_predictor, random_predictor, seeded
from iwm_ray.finetuning.settings import Tune
from iwm_ray.model.encoder import Encoder, sincos_positions
from iwm_ray.model.iwm import IWM
from iwm_ray.model.predictor import Predictor
from iwm_ray.model.segmentation_heads import LinearSegmentation, PyramidSegmentation, upsample
from iwm_ray.segmentation.data import IGNORED, Pairs
from iwm_ray.segmentation.settings import HeadName, SegmentConfig
from iwm_ray.trained import Trained
from iwm_ray.training.loop import autocast
from iwm_ray.views.resize import resize

TASK = "pixels"
"""the one task of the network"""


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


@dataclass(frozen=True)
class WholeEncoder:
    """An encoder of a run that reads whole images, resized to squares of any size (see encoders.FrozenEncoder)."""

    trained: Trained
    which: Literal["target", "context"]
    image_size: int
    mirrored: bool = False
    """tokens of the horizontally flipped images"""

    @property
    def name(self) -> str:
        return f"{self.trained.run.path.name}, {self.which} encoder, step {self.trained.step}"

    @property
    def hash(self) -> str:
        return digest("whole-1", self.trained.hash, self.which, self.image_size, self.mirrored)

    def view(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return resize(image, self.image_size)

    def load(self) -> TokenModel:
        model = self.trained.load()
        encoder = model.target_encoder if self.which == "target" else model.encoder
        spread_positions(encoder, None, self.image_size // encoder.patch_size)
        return RunTokens(encoder, False, self.mirrored)


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


def logits(forward: nn.Module, inputs: Tensor, action_dim: int, side: int) -> Tensor:
    """`[b c s s]` float32 of every pixel; the predictor is asked with the null action.

    Args:
        forward: the network, or DDP around it.
        inputs: `[b 3 s s]` uint8 images, or `[b n d]` tokens of the network's encoder.
        action_dim: length of an action.
        side: of the images, pixels.
    """
    query = Query(torch.zeros(len(inputs), action_dim, device=inputs.device))
    return upsample(forward(inputs, TASK, query).float(), (side, side))


@dataclass(frozen=True)
class PixelObjective:
    """Cross-entropy of the classes of pixels, the mean over those that count (see fit.Objective)."""

    action_dim: int

    def count(self, columns: Columns) -> Tensor:
        return (columns["labels"] != IGNORED).sum()

    def loss(self, tuned: Tuned, forward: nn.Module, columns: Columns, step: int) -> Tensor:
        classes = columns["labels"].long()
        predicted = logits(forward, columns["inputs"], self.action_dim, classes.shape[1])
        return pixel_loss(predicted, classes)


def pixel_loss(predicted: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of `[b c s s]` logits and `[b s s]` classes, the sum over pixels that count."""
    return F.cross_entropy(predicted, classes, ignore_index=IGNORED, reduction="sum")


def predict(
    tuned: Tuned, pairs: Pairs, places: NDArray[np.int64], action_dim: int, runtime: RuntimeConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Readable images `[b 3 s s]` uint8, their classes `[b s s]` and the predicted ones, all on the CPU; b may be 0."""
    images, classes, readable = pairs.read(places, np.zeros_like(places), 0)
    images, classes = images[readable], classes[readable]
    if not len(images):
        return images, classes, classes.long()
    device = model_device(tuned)
    with measuring(tuned), autocast(runtime, device):
        predicted = logits(tuned, images.to(device), action_dim, pairs.size).argmax(1).cpu()
    return images, classes, predicted


def measure(tuned: Tuned, pairs: Pairs, config: SegmentConfig, action_dim: int) -> NDArray[np.int64]:
    """`[k 3 c]` of each readable image: pixels of each class that are right, that are predicted, that there are.

    Raises:
        RunError: none of the images can be read.
    """
    runtime, num_classes = config.runtime, len(pairs.classes.names)
    counts = []
    for first in range(0, len(pairs), config.batch_size):
        places = np.arange(first, min(first + config.batch_size, len(pairs)))
        _, classes, predicted = predict(tuned, pairs, places, action_dim, runtime)
        counts += [
            count_pixels(found.numpy(), asked.numpy(), num_classes)
            for found, asked in zip(predicted, classes, strict=True)
        ]
    if not counts:
        raise RunError(f"not one of the {len(pairs)} images could be decoded; look at the data")
    return np.stack(counts)


def count_pixels(
    predicted: NDArray[np.int64], classes: NDArray[np.int64], num_classes: int
) -> NDArray[np.int64]:
    """`[3 c]`, see `measure`; pixels whose class is IGNORED don't count."""
    counted = classes != IGNORED
    predicted, classes = predicted[counted], classes[counted]
    each = (classes[predicted == classes], predicted, classes)
    return np.stack([np.bincount(values, minlength=num_classes) for values in each])
