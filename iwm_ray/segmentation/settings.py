"""The configuration of a segmentation: one tree of frozen parts."""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from iwm_ray.config import Fraction, Positive, _Part
from iwm_ray.finetuning.settings import TuningConfig, TuningRuntimeConfig

HeadName = Literal["linear", "upernet"]


class SegmentDataConfig(_Part):
    """Images and masks: folders in which an image and its mask have the same name, but for its ending."""

    path: str = ""
    """folder of the training images"""
    masks: str = ""
    """folder of their masks: PNG files, a pixel's value is its class"""
    test_path: str = ""
    """folder of the test images; read once, at the end of every arm"""
    test_masks: str = ""
    """folder of their masks"""
    classes: str = ""
    """names and merging: a CSV file with columns index and name, a JSON file {name: [values]}, or ccp8 (the clothing
    data's classes in eight groups); values without a name are ignored; empty: the values of the training masks"""
    ignore: Annotated[int, Field(ge=-1, le=255)] = 255
    """pixels of this value are neither trained on nor judged; -1: none"""
    num_train: NonNegativeInt = 0
    """training images, a fixed random choice; 0: all"""
    num_test: NonNegativeInt = 0
    """test images, a fixed random choice; 0: all"""


class SegmentAugmentConfig(_Part):
    """What is done to training images, and in the same way to their masks."""

    flip_probability: Fraction = 0.5
    """horizontal flip"""
    crop_area: Annotated[float, Field(gt=0, le=1)] = 0.25
    """smallest area of a random window with the image's aspect, fraction of the image"""


class SegmentConfig(TuningConfig):
    """A segmentation by one trained model."""

    head: HeadName = "upernet"
    """linear: one layer a patch; upernet: pyramid pooling and fusion at patch resolution"""
    encoder: Literal["target", "context"] = "target"
    """which encoder reads the images"""
    image_size: NonNegativeInt = 0
    """side of the images, pixels, a multiple of the patch; 0: that of pretraining. The positions of larger images are
    spread over the range that the model knows"""
    steps: PositiveInt = 1000
    """optimizer steps"""
    batch_size: PositiveInt = 32
    """images a step"""
    lr: Positive = 1e-3
    """peak learning rate of what starts at random: the head, the control's predictor"""
    pretrained_lr_factor: Positive = 0.1
    """what is pretrained learns at this share of the rate (IWM: 1/10)"""
    warmup_fraction: Fraction = 0.1
    """share of the steps in which the learning rate rises; then it falls to 0 as a cosine"""
    weight_decay: NonNegativeFloat = 0.05
    """of AdamW; none on biases and other one-dimensional parameters"""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    """factor of the learning rate from each encoder block to the one below it"""
    clip_grad_norm: NonNegativeFloat = 1.0
    """gradients of a larger norm are scaled down to it; 0: never"""
    data: SegmentDataConfig = SegmentDataConfig()
    augment: SegmentAugmentConfig = SegmentAugmentConfig()
    runtime: TuningRuntimeConfig = TuningRuntimeConfig()

    def hash(self, *parts: str) -> str:
        """Twelve hexadecimal digits of what decides an arm's result besides its own name."""
        tree = self.model_dump(mode="json", exclude={"runtime", "tune", "seeds", "lr"})
        text = json.dumps([tree, *parts], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
