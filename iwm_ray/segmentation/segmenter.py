"""Segmenters: what has been tuned for the classes of pixels, in small files that name the encoder they belong to.

A folder with segmenter.safetensors (predictor, head; the encoder too where it was tuned) and segmenter.json.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from iwm_ray.data.decode import DecodeLimits
from iwm_ray.errors import RunError, UsageError
from iwm_ray.evaluation.features import measuring, model_device
from iwm_ray.finetuning.adapter import Origin, read_facts
from iwm_ray.finetuning.images import AnyImage, channels_first, check_images, rgb_pixels
from iwm_ray.finetuning.model import Start, Tuned, weights_hash
from iwm_ray.finetuning.settings import Tune
from iwm_ray.model.iwm import IWM
from iwm_ray.run_directory import write_json
from iwm_ray.segmentation.network import assemble, image_size, logits
from iwm_ray.segmentation.settings import SegmentConfig
from iwm_ray.trained import Trained
from iwm_ray.views.resize import resize

_TENSORS, FACTS = "segmenter.safetensors", "segmenter.json"


class Facts(Origin):
    """What stands in segmenter.json."""

    tune: Tune
    config: SegmentConfig
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Segmenter:
    """Classes of the pixels of images."""

    trained: Trained = field(repr=False)
    """where its encoder comes from"""
    tuned: Tuned = field(repr=False)
    class_names: tuple[str, ...]
    action_dim: int = field(repr=False)
    image_size: int
    """side of the images, pixels"""

    def fit(self, image: AnyImage) -> Tensor:
        """An image of any size -> `[3 s s]` uint8, of which `predict` takes a stack: the whole image, resized.

        Raises:
            UsageError: no such file, or no RGB image.
        """
        limits = DecodeLimits.from_config(self.trained.config.data)
        return channels_first(resize(rgb_pixels(image, limits), self.image_size))

    def predict(self, images: Tensor) -> Tensor:
        """`[b 3 s s]` uint8 RGB, whole images resized to squares -> `[b s s]` int64 classes, on the model's device.

        Raises:
            UsageError: other sizes or types of images.
        """
        check_images(images, self.image_size)
        with measuring(self.tuned):
            pixels = images.to(model_device(self.tuned))
            return logits(self.tuned, pixels, self.action_dim, self.image_size).argmax(1)


def save(
    folder: Path,
    tuned: Tuned,
    trained: Trained,
    model: IWM,
    config: SegmentConfig,
    class_names: tuple[str, ...],
) -> None:
    """Writes a segmenter; its JSON comes last, so that a folder with it is whole.

    Args:
        folder: is made.
        tuned: the network.
        trained: the run and checkpoint of its encoder.
        model: of that checkpoint, before any tuning.
        config: the segmentation.
        class_names: of pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tuned.own_state().items()}
    partial = folder / f".{_TENSORS}.{os.getpid()}"
    save_file(tensors, partial)
    partial.replace(folder / _TENSORS)
    facts = Facts(
        encoder_hash=weights_hash(_encoder(model, config)),
        tune="predictor" if tuned.is_frozen else "encoder" if tuned.predictor is None else "both",
        run=os.path.relpath(trained.run.path, folder),
        checkpoint=trained.path.name,
        config=config,
        class_names=class_names,
    )
    tree = facts.model_dump(mode="json", exclude={"config": {"data", "runtime"}})
    write_json(folder / FACTS, tree)


def exists(folder: Path) -> bool:
    """Whether a whole segmenter lies there."""
    return (folder / FACTS).exists()


def load(folder: Path, run: Path | None = None) -> Segmenter:
    """A ready segmenter, on the CPU; see `iwm_ray.load`.

    Raises:
        UsageError: none there, or its run has another encoder.
        RunError: its files are damaged.
    """
    facts = read_facts(Facts, folder, FACTS, "segmenter", "segment again")
    trained = facts.trained(folder, run)
    model, config = trained.load(), facts.config
    found = weights_hash(_encoder(model, config))
    if found != facts.encoder_hash:
        raise UsageError(
            f"segmenter {folder}: belongs to the encoder {facts.encoder_hash}, this one is {found}; give its own run"
        )
    start: Start = "none" if facts.tune == "encoder" else "pretrained"
    names = facts.class_names
    tuned = assemble(trained, model, config, facts.tune, start, len(names), 0)
    try:
        tensors = load_file(folder / _TENSORS)
        missing = set(tuned.own_state()) - set(tensors)
        tuned.load_state_dict(tuned.state_dict() | tensors)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise RunError(
            f"segmenter {folder}: {_TENSORS}: {' '.join(str(error).split())}; segment again"
        ) from None
    if missing:
        raise RunError(f"segmenter {folder}: {min(missing)} is missing; segment again")
    return Segmenter(trained, tuned.eval(), names, trained.policy.action_dim, image_size(trained, config))


def _encoder(model: IWM, config: SegmentConfig) -> torch.nn.Module:
    return model.target_encoder if config.encoder == "target" else model.encoder
