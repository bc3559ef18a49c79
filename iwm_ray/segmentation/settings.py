"""The configuration of a segmentation: one tree of frozen parts."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from iwm_ray.config import Fraction, _Part
from iwm_ray.finetuning.settings import TuningConfig, TuningDataConfig

HeadName = Literal["linear", "upernet"]


class SegmentDataConfig(TuningDataConfig):
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
    """pixels of this value are neither trained on nor judged, and no named class may have it; -1: none"""
    num_train: NonNegativeInt = 0
    """training images, a fixed random choice; 0: all"""
    num_test: NonNegativeInt = 0
    """test images, a fixed random choice; 0: all"""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """share of the training images on which a learning rate of `lr_grid` is chosen"""


class SegmentAugmentConfig(_Part):
    """What is done to training images, and in the same way to their masks."""

    flip_probability: Fraction = 0.5
    """horizontal flip"""
    crop_area: Annotated[float, Field(gt=0, le=1)] = 0.25
    """smallest area of a random window with the image's aspect, fraction of the image; 1: the whole image, so that
    tokens of a frozen encoder are computed once"""


class SegmentConfig(TuningConfig):
    """A segmentation by one trained model."""

    head: HeadName = "upernet"
    """linear: one layer a patch; upernet: pyramid pooling and fusion at patch resolution"""
    image_size: NonNegativeInt = 0
    """side of the images, pixels, a multiple of the patch; 0: that of pretraining. The positions of larger images are
    spread over the range that the model knows"""
    steps: PositiveInt = 1000
    """optimizer steps"""
    batch_size: PositiveInt = 32
    """images a step, over all workers; fewer where the training set has fewer"""
    data: SegmentDataConfig = SegmentDataConfig()
    augment: SegmentAugmentConfig = SegmentAugmentConfig()

    @property
    def ways(self) -> tuple[str, ...]:
        ways = ["linear_head"] * (self.head == "linear") + ["context_encoder"] * (self.encoder == "context")
        return tuple(ways + [f"{self.image_size}_pixels"] * bool(self.image_size))
